"""What a trace's methods record, without a server: metrics, patterns, knockouts, stops, stored rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import trocar
from trocar import errors
from trocar.client.handles import Stored
from trocar.client.trace import Trace, as_array
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation

FACTS = ModelFacts(
    name="paper", fingerprint="f", lineage="paper", family="llama", dtype="float32", n_layers=4, d_model=8, d_mlp=16,
    n_heads=2, n_kv_heads=1, d_head=4, vocab_size=300, context=64, parameters=1, weight_bits=1, open_weights=True,
    sites=("resid_post", "z", "attn_probs", "final_norm"), unavailable={}, eos=(0,),
)  # fmt: skip
HANDLE = f"act_{'a' * 32}"
ACTS = Stored(HANDLE, ("final_norm", "resid_post.1"), {"final_norm": 8, "resid_post.1": 8}, 4, 0)


class Nobody:
    def plan(self, recorded: Any) -> None: ...

    def run(self, recorded: Any) -> None: ...


@pytest.fixture
def t() -> Trace[None, None]:
    return Trace(Nobody(), FACTS, ["a b", "c d"], Generation())


def nodes(t: Trace[None, None]) -> list[dict[str, Any]]:
    return [{k: v for k, v in n if v is not None} for n in t.recorded.request.program.nodes]


def test_metrics(t: Trace[None, None]) -> None:
    t.save("one", t.logit_diff(" a", 5))
    t.save("each", t.logit_diff([" a", " b"], [" c", 7], at="prompt[*]"))
    t.save("ce", t.cross_entropy())
    t.save("kl", t.kl(ACTS.at("final_norm"), at=0))
    one, each, ce, stored, kl = nodes(t)
    assert one == {
        "id": "one",
        "op": "metric",
        "metric": "logit_diff",
        "at": "prompt[-1]",
        "tokens": (" a", 5),
    }
    assert (each["tokens"], each["at"]) == (((" a", " c"), (" b", 7)), "prompt[*]")
    assert (ce["metric"], ce["at"]) == ("cross_entropy", "prompt[:-1]")
    assert (stored["op"], stored["site"]) == ("stored", "final_norm")
    assert (kl["to"], kl["at"]) == (stored["id"], "prompt[0]")


@pytest.mark.parametrize(("first", "second"), [([1, 2], 3), (1, [2, 3]), ([1], [2, 3])])
def test_tokens_that_are_no_pairs(t: Trace[None, None], first: Any, second: Any) -> None:
    with pytest.raises(errors.ClientError) as caught:
        t.logit_diff(first, second)
    assert (caught.value.code, caught.value.path) == ("bad_argument", "second")


def test_attention(t: Trace[None, None]) -> None:
    t.knockout([1, -1], keys="prompt[0]", heads=1)
    t.knockout(2, at="gen[*]", keys=slice(0, 2))
    t.save("probs", t.pattern(t.attn_probs[1].read(keys=0)))
    one, last, later, _, pattern = nodes(t)
    assert (one["site"], one["at"], one["keys"], one["heads"]) == (
        "attn_probs.1",
        "prompt[-1]",
        "prompt[0]",
        (1,),
    )
    assert last["site"] == "attn_probs.3"
    assert (later["at"], later["keys"]) == ("gen[*]", "prompt[0:2]")
    assert pattern["op"] == "pattern"
    with pytest.raises(errors.ClientError, match=r"\.read\(at="):
        t.pattern(t.attn_probs[1])  # type: ignore[arg-type]


def test_masks_dictionaries_and_a_stop(t: Trace[None, None]) -> None:
    h = t.resid_post[1][-1]
    arrays = {"w_enc": np.ones((8, 3)), "b_enc": np.ones(3), "w_dec": np.ones((3, 8)), "b_dec": np.ones(8)}
    low = h.encode(t.sae(**arrays)).norm() < 1
    t.apply(trocar.edit.set("resid_post.1", t.where(low, h, np.zeros(8)), at=-1, gate=low))
    t.save("low", t.score(low))
    t.save("kept", t.capture(h, reduce="mean"))
    t.stop_after(-2)
    assert [n["op"] for n in nodes(t)] == [
        "read", "sae", "encode", "norm", "lt", "tensor", "where", "edit.set", "score", "capture", "stop_after",
    ]  # fmt: skip
    assert nodes(t)[-1]["layer"] == 2
    assert nodes(t)[-2]["reduce"] == "mean"
    assert {k: v.shape for k, v in t.recorded.vectors.items()} == {
        "v0": (8, 3), "v1": (3,), "v2": (3, 8), "v3": (8,), "v4": (8,),
    }  # fmt: skip
    assert "gate" in repr(t)
    assert t.sae(trocar.Sae(**arrays)).content == "dictionary"


def test_stored_rows_may_be_chosen(t: Trace[None, None]) -> None:
    rows = ACTS.at("resid_post.1")
    t.resid_post[1][-1] = rows.rows(prompts=[1, 1], at=-1)
    t.resid_post[1][0] = rows
    chosen, _, plain, _ = nodes(t)
    assert (chosen["prompts"], chosen["at"]) == ((1, 1), "prompt[-1]")
    assert "prompts" not in plain
    assert plain["at"] == "prompt[*]"


def test_arrays_of_one_and_two_dimensions() -> None:
    assert as_array("v", [[1, 2]]).shape == (1, 2)
    for value in (1.0, np.ones((1, 1, 1)), ["a"]):
        with pytest.raises(errors.ClientError) as caught:
            as_array("v", value)
        assert caught.value.code == "bad_argument"
