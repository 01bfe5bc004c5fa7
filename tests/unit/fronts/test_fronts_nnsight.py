"""Each idiom of nnsight records the program that a native trace records, and gives what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import trocar
from trocar import nnsight
from trocar.nnsight import LanguageModel


def test_edits_in_place(lm: LanguageModel, model: trocar.Model, same: Any, v: Any) -> None:
    with lm.scan("hello") as tracer:
        lm.model.layers[0].output[0][:, -1] += v
        lm.model.layers[1].output[0][:] -= v
        lm.model.layers[1].mlp.output *= 0.5
        lm.model.layers[2].self_attn.output[0][:] = 0
        lm.model.layers[2].mlp.output[:, 1:3, :] = v
        lm.model.layers[3].input[:, [0, 2]] /= 2
        lm.lm_head.output[:, -1].argmax(-1).save()
    with model.trace("hello") as t:
        t.resid_post[0][-1] += v
        t.resid_post[1][:] -= v
        t.mlp_out[1][:] *= 0.5
        t.attn_out[2][:] = 0
        t.mlp_out[2][1:3] = v
        t.resid_pre[3]["prompt[0,2]"] *= 0.5
        t.save("saved0", t.lens(t.final_norm[-1], top_k=1))
    same(tracer.recorded, t.recorded)
    assert tracer.plan.view.admitted


def test_replacement_and_arithmetic(lm: LanguageModel, model: trocar.Model, same: Any, v: Any) -> None:
    with lm.scan("hello") as tracer:
        lm.model.layers[1].mlp.output = lm.model.layers[1].mlp.output * 0.5 + v
        early = lm.model.layers[0].output[0][:, 1, :]
        lm.model.layers[2].output[0][:, -1, :] = early
        lm.model.layers[3].output[0] = lm.model.layers[2].output[0]
        h = lm.model.layers[1].output[0][:, -1]
        lm.model.layers[3].output[0][:, -1] += h * (h @ v) - h.normalize().relu()
        (lm.model.layers[1].output[0] @ v).save()
    with model.trace("hello") as t:
        t.mlp_out[1][:] = t.mlp_out[1][:] * 0.5 + v
        t.resid_post[2][-1] = t.resid_post[0][1]
        t.resid_post[3][:] = t.resid_post[2][:]
        h1, h2, h3 = (t.resid_post[1][-1] for _ in range(3))
        t.resid_post[3][-1] += h1 * (h2 @ v) - h3.normalize().relu()
        t.save("saved0", t.score(t.resid_post[1][:] @ v))
    assert len(tracer.recorded.request.program.nodes) == len(t.recorded.request.program.nodes)
    ops = [
        [(n.op, getattr(n, "site", "")) for n in r.request.program.nodes]
        for r in (tracer.recorded, t.recorded)
    ]
    assert sorted(ops[0]) == sorted(ops[1])


def test_a_fitted_direction_is_that_of_the_place(lm: LanguageModel, model: trocar.Model, same: Any) -> None:
    acts = model.capture([f"{'yes' if i % 2 else 'no'} {i}" for i in range(24)], sites="resid_post.*")
    probe = acts.fit("mean_diff", [i % 2 for i in range(24)])
    with lm.scan("hello") as tracer:
        lm.model.layers[1].output[0] += 2.0 * probe.direction
        lm.model.layers[2].output[0][:] = lm.model.layers[2].output[0] - probe.direction
        (lm.model.layers[3].output[0][:, -1] @ probe.direction).save()
    with model.trace("hello") as t:
        t.resid_post[1][:] += 2.0 * probe.direction
        t.resid_post[2][:] = t.resid_post[2][:] - t.vector(probe, "resid_post.2")
        t.save("saved0", t.score(t.resid_post[3][-1] @ t.vector(probe, "resid_post.3")))
    same(tracer.recorded, t.recorded)


def test_heads_and_neurons(lm: LanguageModel, model: trocar.Model, same: Any) -> None:
    with lm.scan("hello") as tracer:
        lm.model.layers[1].self_attn.o_proj.input[:, -1, 8:16] = 0
        lm.model.layers[2].mlp.down_proj.input[:, :, 7] = 0
        lm.lm_head.output[:, -1].argmax(-1).save()
    with model.trace("hello") as t:
        t.z[1].heads(1)[-1] = 0
        t.mlp_act[2].neurons(7)[:] = 0
        t.save("saved0", t.lens(t.final_norm[-1], top_k=1))
    same(tracer.recorded, t.recorded)


def test_paths_of_another_family(gpt2: trocar.Model, same: Any, v: Any) -> None:
    lm = LanguageModel(gpt2)
    with lm.scan("hello") as tracer:
        lm.transformer.h[-1].output[0][:, -1] += v
        lm.transformer.h[1].attn.c_proj.input[:, :, 0:8] = 0
        lm.transformer.h[2].mlp.output.save()
    with gpt2.trace("hello") as t:
        t.resid_post[3][-1] += v
        t.z[1].heads(0)[:] = 0
        t.save("saved0", t.capture(t.mlp_out[2][:]))
    same(tracer.recorded, t.recorded)
    assert len(lm.transformer.h) == 4
    assert [repr(m) for m in lm.transformer.h[2:]] == [
        "<module transformer.h[2] of tiny>",
        "<module transformer.h[3] of tiny>",
    ]


def test_a_saved_value_is_a_handle(lm: LanguageModel, model: trocar.Model) -> None:
    words = [f"{'yes' if i % 2 else 'no'} {i}" for i in range(24)]
    with lm.trace(words):
        rows = lm.model.layers[1].output[0][:, -1].save()
        again = nnsight.save(lm.model.layers[2].input[:, -1])
    assert (rows.site, rows.value.rows, again.site) == ("resid_post.1", 24, "resid_pre.2")
    assert rows.handle.startswith("act_")
    assert rows.fit("logistic", [i % 2 for i in range(24)]).sites == ("resid_post.1",)
    edit = trocar.edit.add("resid_post.1", rows.rows(prompts=[3]), at=-1)
    assert model.generate("a", edits=[edit], max_new_tokens=2).receipt.edits[0].rows == 1


def test_tokens_logprobs_and_differences(lm: LanguageModel, model: trocar.Model) -> None:
    with lm.trace(["abc", "hello"]) as tracer:
        logits = lm.lm_head.output[:, -1]
        first = logits.argmax(dim=-1).save()
        values, indices = logits.log_softmax(-1).topk(3)
        values, indices = values.save(), indices.save()
        chances = lm.output.logits[:, -1].softmax(-1).topk(3).values.save()
        named = lm.logits.log_softmax(-1)[:, -1, ["a", 7]].save()
        one = lm.logits[:, -1].log_softmax(-1)[:, 7].save()
        difference = (logits[:, "a"] - logits[:, "b"]).save()
        every = lm.lm_head.output.argmax(-1).save()
    with model.trace(["abc", "hello"]) as t:
        t.save("top", t.lens(t.final_norm[-1], top_k=3))
        t.save("named", t.logprobs(["a", 7]))
        t.save("difference", t.logit_diff("a", "b"))
        t.save("every", t.lens(t.final_norm[:], top_k=1))
    native = t.run().result()
    assert first.tolist() == native["top"].ids[0, :, 0].tolist()
    assert indices.tolist() == native["top"].ids[0].tolist()
    assert indices.texts == native["top"].texts[0]
    assert np.asarray(values) == pytest.approx(native["top"].logprobs[0], abs=1e-6)
    assert np.asarray(chances) == pytest.approx(np.exp(native["top"].logprobs[0]), rel=1e-5)
    assert np.asarray(named) == pytest.approx(native["named"].values, abs=1e-6)
    assert one.tolist() == named[:, 1].tolist()
    assert np.asarray(difference) == pytest.approx(native["difference"].values, abs=1e-5)
    assert every.shape == (8,)
    lenses = [n for n in tracer.recorded.request.program.nodes if n.op == "lens"]
    assert len(lenses) == 4  # values and indices of one topk are one output


def test_the_shape_of_one_prompt(lm: LanguageModel) -> None:
    with lm.trace("hello"):
        token = lm.lm_head.output[0, -1].argmax(-1).save()
        row = lm.lm_head.output[0][-1].topk(2).save()
        batch = lm.lm_head.output.argmax(-1).save()
        number = (lm.logits[0, -1, 5] - lm.logits[0, -1, 6]).save()
    assert (token.shape, row.shape, batch.shape, number.shape) == ((), (2,), (1, 5), ())
    assert int(token) == token.item() == row[0] == batch[0, -1]
    assert float(number) == number.value


def test_a_logit_lens_is_a_call_of_the_last_norm_and_the_head(
    lm: LanguageModel, model: trocar.Model, same: Any
) -> None:
    with lm.trace("hello") as tracer:
        found = [
            lm.lm_head(lm.model.norm(layer.output[0][:, -1])).topk(2).save() for layer in lm.model.layers
        ]
        lm.lm_head(lm.model.norm.output[:, -1]).argmax(-1).save()
    with model.trace("hello") as t:
        for i in range(4):
            t.save(f"saved{i}", t.lens(t.resid_post[i][-1], top_k=2))
        t.save("saved4", t.lens(t.final_norm[-1], top_k=1))
    same(tracer.recorded, t.recorded)
    assert found[0].tolist() == t.run().result()["saved0"].ids[0].tolist()


def test_steps_of_a_generation(lm: LanguageModel, model: trocar.Model, same: Any, v: Any) -> None:
    with lm.generate("hello", max_new_tokens=6) as tracer:
        lm.model.layers[0].output[0][:] += v
        with tracer.iter[2:5]:
            lm.model.layers[1].output[0][:] += v
        for _ in tracer.iter[:]:
            lm.model.layers[2].output[0][:, -1] *= 0.9
        with tracer.all():
            lm.model.layers[3].output[0][:] *= 0.9
            lm.model.layers[3].mlp.output[:] = lm.model.layers[2].mlp.output
        with lm.model.layers[0].all(), tracer.iter[0]:
            lm.model.layers[0].mlp.output[:] *= 0.9
        with tracer.iter[1:]:
            tokens = lm.lm_head.output[0, -1].argmax(-1).save()
        text = lm.generator.output.save()
        same_text = tracer.result.save()
    with model.trace("hello", max_new_tokens=6) as t:
        t.resid_post[0][:] += v
        t.resid_post[1]["gen[1:4]"] += v
        t.resid_post[2][-1] *= 0.9
        t.resid_post[2]["gen[*]"] *= 0.9
        t.resid_post[3] *= 0.9
        t.mlp_out[3]["all"] = t.mlp_out[2]["all"]
        t.mlp_out[0][:] *= 0.9
        t.save("saved0", t.lens(t.final_norm["gen[*]"], top_k=1))
        t.save("saved1", t.text())
        t.save("saved2", t.text())
    same(tracer.recorded, t.recorded)
    assert text.value == same_text.value == t.run().result()["saved1"]
    assert tokens.tolist()[: len(text[0].ids) - 1] == list(text[0].ids[1:])


def test_invokes_are_requests_and_pass_on_what_they_saved(lm: LanguageModel, model: trocar.Model) -> None:
    with lm.trace() as tracer:
        with tracer.invoke("abc"):
            clean = lm.model.layers[2].output[0][:, -1].save()
            there = lm.lm_head.output[0, -1].argmax(-1).save()
        with tracer.invoke("xyz"):
            lm.model.layers[2].output[0][:, -1] = clean
            lm.model.layers[3].output[0][:, -1] = clean
            patched = lm.lm_head(lm.model.norm(lm.model.layers[2].output[0][:, -1])).argmax(-1).save()
        with tracer.invoke(["xyz", "uvw"]):
            both = lm.lm_head.output[:, -1].argmax(-1).save()
    assert there.shape == ()
    with model.trace("abc") as t:
        t.save("top", t.lens(t.resid_post[2][-1], top_k=1))
    assert patched.tolist() == t.run().result()["top"].ids[0, :, 0].tolist()
    assert both.shape == (2,)


def test_stop_leaves_out_what_comes_later(lm: LanguageModel, model: trocar.Model, same: Any) -> None:
    with lm.trace("hello") as tracer:
        lm.model.layers[1].output[0].save()
        lm.model.layers[0].mlp.output.save()
        tracer.stop()
    with model.trace("hello") as t:
        t.save("saved0", t.capture(t.resid_post[1][:]))
        t.save("saved1", t.capture(t.mlp_out[0][:]))
        t.stop_after(1)
    same(tracer.recorded, t.recorded)


def test_a_view_reads_when_it_is_used_unless_its_place_was_given_another_value(
    lm: LanguageModel, model: trocar.Model, same: Any, v: Any
) -> None:
    with lm.scan("hello") as tracer:
        h = lm.model.layers[1].output[0][:, -1]
        before = h.clone()
        h += v
        (h @ v).save()
        (before @ v).save()
        m = lm.model.layers[2].mlp.output
        lm.model.layers[2].mlp.output = v
        (m @ v).save()
    reads = {n.id: i for i, n in enumerate(tracer.recorded.request.program.nodes)}
    nodes = {n.id: n for n in tracer.recorded.request.program.nodes}
    edits = {n.site: reads[n.id] for n in nodes.values() if n.op.startswith("edit")}

    def read_of(output: str) -> int:
        return reads[nodes[nodes[output].of].a]

    assert read_of("saved0") > edits["resid_post.1"] > read_of("saved1")
    assert read_of("saved2") < edits["mlp_out.2"]


def test_nothing_runs_when_the_block_raises(lm: LanguageModel, server: Any) -> None:
    before = server.forwards()
    kept = []

    def broken() -> None:
        with lm.trace("hello"):
            kept.append(lm.model.layers[0].output[0].save())
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        broken()
    assert server.forwards() == before
    with pytest.raises(trocar.ClientError, match="nothing has run yet"):
        _ = kept[0].value
    with lm.trace("hello", remote=True):  # and the model is free for the next trace
        lm.lm_head.output[:, -1].argmax(-1).save()


def test_importing_it_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, trocar.nnsight, trocar.hooks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
