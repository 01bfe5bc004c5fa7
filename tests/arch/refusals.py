"""Run by a test with and without `-O`: provokes refusals of the gate and the checker and prints their codes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trocar.errors import TrocarError
from trocar.gate import coding, release
from trocar.gate.gate import Gate, Hold
from trocar.gate.policy import Data, People, Policy, Role, Tier, Tiers
from trocar.gate.use import Use
from trocar.graph import check
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope

FACTS = ModelFacts(
    name="toy", fingerprint="sha256:0", lineage="toy", family="llama", dtype="float32", n_layers=2, d_model=8,
    d_mlp=16, n_heads=2, n_kv_heads=2, d_head=4, vocab_size=100, context=64, parameters=10_000, weight_bits=160_000,
    open_weights=False, sites=("resid_post",), unavailable={}, eos=(0,),
)  # fmt: skip


def outcome(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except TrocarError as e:
        return e.code
    except TypeError:
        return "TypeError"
    return "accepted"


def cost(bits: int) -> Cost:
    return Cost(
        tokens=1, rows_read=0, flops=1, bytes_stored=0, bits_out={"overhead": bits}, total_bits=bits, download_bits=0
    )  # fmt: skip


class Silent:
    """A tokenizer that nobody asks."""

    def decode(self, ids: list[int]) -> str:
        raise SystemExit(ids)

    def token_texts(self, ids: list[int]) -> list[str]:
        raise SystemExit(ids)


def checked(nodes: list[dict[str, Any]]) -> Any:
    scope = Scope(FACTS, (4,), Generation(), {}, {}, lambda _: [1])
    program = Program.model_validate_json(json.dumps({"nodes": nodes}))
    return check.check(program, scope, Prices(8, 256))


def in_a_day() -> Policy:
    """The default policy, but what is for life may be spent on one day."""
    terms = Policy().terms(Tier.trusted).model_copy(update={"day_ppm": None})
    return Policy(people=People(tiers=Tiers(trusted=terms)), data=Data(lineage_day_ppm=1_000_000))


def main(folder: Path) -> dict[str, Any]:
    gate = Gate(f"sqlite:///{folder / 'ledger.db'}", in_a_day(), cap=Tier.trusted)
    gate.declare(FACTS)
    key = gate.keys.create("lab", Tier.trusted, Role.researcher)  # 1 % of 160,000 bits: 1,600
    caller = gate.keys.authenticate(key.secret)
    hold = gate.reserve(caller, FACTS, Silent(), cost(300), "0" * 64, None, Use())
    if not isinstance(hold, Hold):
        raise SystemExit("the first request was not admitted")
    settle = gate.ledger.settle
    read = {"id": "h", "op": "read", "site": "resid_post.9", "at": "prompt[-1]"}
    seen: dict[str, Any] = {
        "debug": __debug__,
        "seal": outcome(lambda: release.Released(object(), b"{}", 200, None)),
        "no key": outcome(lambda: gate.keys.authenticate(None)),
        "bad key": outcome(lambda: gate.keys.authenticate("trk_" + "A" * 43)),
        "over budget": outcome(
            lambda: gate.reserve(caller, FACTS, Silent(), cost(1400), "1" * 64, None, Use())
        ),
        "settled above the hold": outcome(lambda: settle(hold.reservation, 301, b"{}")),
        "not public": outcome(lambda: release.public({"h": 1})),  # type: ignore[arg-type]
        "not finite": outcome(lambda: coding.round_to_bits(np.array([np.nan], np.float32), 24)),
        "out of range": outcome(lambda: checked([read])),
        "no output": outcome(lambda: checked([{**read, "site": "resid_post.1"}])),
    }
    settle(hold.reservation, 300, b"{}")
    seen["settled twice"] = outcome(lambda: settle(hold.reservation, 300, b"{}"))
    gate.close()
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(Path(folder))))
