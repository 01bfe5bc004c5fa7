"""Each idiom of TransformerLens records the program that a native trace records, and gives what it promises."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import trocar
from trocar.hooks import HookedModel, logit_diff, logprobs, loss, top


def recorded(logits: Any, ask: Any) -> Any:
    """The request that a question would send."""
    branch = logits._recording.branch()
    branch.trace.save("saved0", ask.output(branch.trace))
    return branch.trace.recorded


def test_functions_are_recorded_once(hooked: HookedModel, model: trocar.Model, same: Any, v: Any) -> None:
    calls = []

    def steer(value: Any, hook: Any, by: float) -> None:
        calls.append((hook.name, hook.layer()))
        value[:, -1] += by * v

    def ablate(z: Any, hook: Any) -> Any:
        z[:, -1, 1] = 0
        z[:, :, [0, 2], :] *= 0.5
        return z

    def neuron(post: Any, hook: Any) -> None:
        post[..., 7] = 0

    hooks = [
        ("blocks.0.hook_resid_post", partial(steer, by=2.0)),
        ("blocks.1.attn.hook_z", ablate),
        (("post", 2), neuron),
        ("resid_mid.2", lambda x, hook: x + v),
        (lambda name: name.endswith("3.hook_mlp_out"), lambda x, hook: 0),
    ]
    logits = hooked.run_with_hooks(["abc", "hello"], fwd_hooks=hooks)
    with model.trace(["abc", "hello"]) as t:
        t.resid_post[0][-1] += 2.0 * v
        t.z[1].heads(1)[-1] = 0
        t.z[1].heads(0, 2)[:] *= 0.5
        t.mlp_act[2].neurons(7)[:] = 0
        t.resid_mid[2][:] = t.resid_mid[2][:] + v
        t.mlp_out[3][:] = 0
        t.save("saved0", t.lens(t.final_norm[-1], top_k=3))
    same(recorded(logits, top(3)), t.recorded)
    native = t.run().result()["saved0"]
    assert logits.top(3).ids.tolist() == native.ids.tolist()
    assert logits.ask(top(3), loss())[0].ids.tolist() == native.ids.tolist()
    assert calls == [("blocks.0.hook_resid_post", 0)]


def test_edits_without_a_site(hooked: HookedModel, model: trocar.Model, same: Any, v: Any) -> None:
    hooks = [
        ("blocks.1.hook_resid_post", trocar.edit.project_out("*", v, at=-1)),
        ("blocks.2.hook_attn_out", trocar.edit.zero("attn_out.2")),
        ("blocks.2.attn.hook_pattern", trocar.edit.knockout("*", keys=0)),
    ]
    logits = hooked.run_with_hooks("hello", fwd_hooks=hooks)
    with model.trace("hello") as t:
        t.apply(
            trocar.edit.project_out("resid_post.1", v, at=-1),
            trocar.edit.zero("attn_out.2"),
            trocar.edit.knockout("attn_probs.2", keys=0),
        )
        t.save("saved0", t.logprobs([5]))
    same(recorded(logits, logprobs([5])), t.recorded)


def test_a_cache_of_handles(hooked: HookedModel, model: trocar.Model) -> None:
    logits, cache = hooked.run_with_cache(
        ["abc", "hello"], names_filter=lambda name: name.endswith("hook_resid_post")
    )
    assert list(cache) == [f"blocks.{i}.hook_resid_post" for i in range(4)]
    entry = cache["resid_post", 1]
    assert entry is cache["blocks.1.hook_resid_post"] is cache["resid_post.1"]
    assert cache["resid_post", -1] is cache["blocks.3.hook_resid_post"]
    assert ("resid_post", 2) in cache
    assert ("mlp_out", 2) not in cache
    assert (entry.site, entry.value.rows) == ("resid_post.1", 8)
    assert logits.top(1).ids.shape == (1, 2, 1)
    assert {h.handle for h in model._client.handles()} >= {x.handle for x in cache.values()}


def test_a_cached_entry_is_a_value_in_a_hook(hooked: HookedModel, model: trocar.Model, same: Any) -> None:
    _, clean = hooked.run_with_cache("abc", names_filter="blocks.1.hook_resid_post", return_type=None)

    def patch(value: Any, hook: Any) -> Any:
        value[:, 2] = clean[hook.name][:, -1]
        return value

    logits = hooked.run_with_hooks("hello", fwd_hooks=[("blocks.1.hook_resid_post", patch)])
    with model.trace("hello") as t:
        rows = clean["resid_post", 1].value["resid_post.1"].rows(at=-1)
        t.resid_post[1][2] = rows
        t.save("saved0", t.logit_diff("a", "b"))
    same(recorded(logits, logit_diff("a", "b")), t.recorded)
    assert logits.logit_diff("a", "b").values == pytest.approx(t.run().result()["saved0"].values)


def test_rows_of_a_cache_can_be_fitted(hooked: HookedModel) -> None:
    words = [f"{'yes' if i % 2 else 'no'} {i}" for i in range(24)]
    _, cache = hooked.run_with_cache(
        words,
        names_filter=["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"],
        pos_slice=-1,
        return_type=None,
    )
    probe = cache["resid_post", 1].fit("logistic", [i % 2 for i in range(24)])
    assert (len(cache), cache["z", 2].value.rows, probe.sites) == (2, 24, ("resid_post.1",))


def test_answers_of_one_run(hooked: HookedModel, model: trocar.Model) -> None:
    asked = [top(2), logprobs(["a"]), logit_diff("a", "b"), "loss"]
    found = hooked("hello", return_type=asked)
    with model.trace("hello") as t:
        t.save("top", t.lens(t.final_norm[-1], top_k=2))
        t.save("loss", t.cross_entropy())
    native = t.run().result()
    assert found[0].ids.tolist() == native["top"].ids.tolist()
    assert found[1].values.shape == (1, 1)
    assert found[2].metric == "logit_diff"
    assert found[3].values.tolist() == native["loss"].values.tolist()
    assert hooked("hello", return_type="loss").values.tolist() == native["loss"].values.tolist()
    (best, _), cache = hooked.run_with_cache("hello", names_filter="hook_embed", return_type=(top(1), "loss"))
    assert best.ids[0, 0, 0] == native["top"].ids[0, 0, 0]
    assert cache["hook_embed"].value.rows == 5


def test_hooks_of_a_block_and_generation(hooked: HookedModel, model: trocar.Model, v: Any) -> None:
    def last(x: Any, hook: Any) -> None:
        x[:, -1] += v

    hooks = [("blocks.1.hook_resid_post", lambda x, hook: x * 2), ("blocks.2.hook_resid_post", last)]
    with hooked.hooks(fwd_hooks=hooks):
        text = hooked.generate("hello", max_new_tokens=4)
        inside = hooked("hello").top(1).ids
    with model.trace("hello", max_new_tokens=4) as t:
        t.resid_post[1]["all"] = t.resid_post[1]["all"] * 2
        t.resid_post[2][-1] += v
        t.resid_post[2]["gen[*]"] += v
        t.save("text", t.text())
    native = t.run().result()["text"][0]
    assert (text, text.ids) == (native, native.ids)
    assert hooked("hello").top(1).ids.tolist() != inside.tolist() or text != hooked.generate(
        "hello", max_new_tokens=4
    )
    assert len(hooked.generate(["a", "b"], max_new_tokens=1)) == 2


def test_stop_at_layer(hooked: HookedModel) -> None:
    logits, cache = hooked.run_with_cache("abc", names_filter=("blocks.0.hook_resid_post",), stop_at_layer=1)
    assert (logits, len(cache)) == (None, 1)
    with pytest.raises(trocar.ProgramError) as late:
        hooked.run_with_cache("abc", names_filter="blocks.2.hook_resid_post", stop_at_layer=-3)
    assert late.value.code == "after_stop"


def test_names_and_sizes(hooked: HookedModel, model: trocar.Model) -> None:
    assert hooked.hook_names[:2] == ("hook_embed", "blocks.0.hook_resid_pre")
    assert hooked.hook_names[-1] == "ln_final.hook_out"
    assert {"blocks.3.hook_mlp_out", "blocks.3.hook_attn_out"} <= set(hooked.hook_names)
    assert not any("pattern" in name for name in hooked.hook_names)
    assert (hooked.cfg.n_layers, hooked.cfg.d_vocab) == (model.n_layers, model.facts.vocab_size)
    _, everything = hooked.run_with_cache("a", pos_slice=-1)
    assert tuple(everything) == hooked.hook_names
