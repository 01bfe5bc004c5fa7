"""Everything that cannot be recorded is refused by name, with the way it is done here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import trocar
from trocar import hooks, nnsight
from trocar.hooks import HookedModel
from trocar.nnsight import LanguageModel

Case = tuple[str, Callable[[LanguageModel], Any], str, str, str]
V = np.ones(32, dtype=np.float32)


def h(lm: LanguageModel) -> Any:
    return lm.model.layers[1].output[0]


def logits(lm: LanguageModel) -> Any:
    return lm.lm_head.output


def put(rows: Any, value: Any) -> None:
    rows[:] = value


def put_logits(lm: LanguageModel) -> None:
    lm.lm_head.output = 0


def put_name(lm: LanguageModel) -> None:
    lm.model.layers[1].weight = V


# what: (name, what is written, code, words of the reason, words of the next step)
INSIDE: list[Case] = [
    ("grad", lambda lm: h(lm).grad, "bad_argument", "gradients are not computed", "logit_diff"),
    ("backward", lambda lm: logits(lm).backward(), "bad_argument", "gradients", "patch or ablate"),
    (
        "skip",
        lambda lm: lm.model.layers[1].skip(V),
        "bad_argument",
        "computed or the program stops",
        "tracer.stop",
    ),
    (
        "source",
        lambda lm: lm.model.layers[1].self_attn.source,
        "bad_argument",
        "source code",
        "docs/sites.md",
    ),
    ("inputs", lambda lm: lm.model.layers[1].inputs, "bad_argument", "no places", "Write .input"),
    ("next", lambda lm: lm.model.layers[1].next(), "bad_argument", "named, not walked", "tracer.iter"),
    ("if", lambda lm: bool(h(lm)), "not_here", "no branches on values", "gate"),
    ("for", lambda lm: list(h(lm)), "not_here", "cannot be walked", "Loop over layers"),
    ("len", lambda lm: len(h(lm)), "bad_argument", "known on the server", "tokenize"),
    ("shape", lambda lm: h(lm).shape, "bad_argument", "known on the server", "width"),
    ("float", lambda lm: float(h(lm)), "not_here", "not a local number", "save()"),
    ("int", lambda lm: int(h(lm)), "not_here", "not a local number", "save()"),
    ("index", lambda lm: [1, 2][h(lm)], "not_here", "not a local number", "save()"),
    ("numpy", lambda lm: np.asarray(h(lm)), "not_here", "not a local array", "save()"),
    ("cpu", lambda lm: h(lm).cpu(), "bad_argument", "rows stay on the server", "Leave it out"),
    ("permute", lambda lm: h(lm).permute(0, 2, 1), "bad_argument", "no other shape", "[:, position]"),
    ("misspelt", lambda lm: h(lm).relo(), "bad_argument", "no op records it", "docs/programs.md"),
    ("torch", lambda lm: torch.where(h(lm), 1, 0), "bad_argument", "torch.where cannot run", "gate"),
    ("torch add", lambda lm: torch.add(h(lm), h(lm)), "bad_argument", "torch.add cannot run", "operators"),
    (
        "functional",
        lambda lm: torch.nn.functional.softmax(logits(lm)),
        "bad_argument",
        "softmax",
        ".softmax(-1)",
    ),
    ("compare", lambda lm: h(lm) > 0, "bad_argument", "is compared with 0", "gate="),
    ("equal", lambda lm: h(lm) == 0, "bad_argument", "is compared with 0", "gate="),
    ("power", lambda lm: h(lm) ** 2, "bad_argument", "no op records this arithmetic", "rows @ v"),
    ("divide", lambda lm: h(lm) / h(lm).norm(dim=-1), "bad_argument", "divided by a value", ".normalize()"),
    ("call", lambda lm: h(lm)(V), "bad_argument", "is called", "modules are called by name"),
    (
        "module call",
        lambda lm: lm.model.layers[1].mlp(h(lm)),
        "bad_argument",
        "is applied to rows",
        "lm_head(norm",
    ),
    ("normed", lambda lm: lm.model.norm(h(lm)).save(), "bad_argument", "after the last norm", "lm_head"),
    ("a number", lambda lm: put(h(lm), 1), "bad_argument", "1 is assigned", "numpy.full"),
    ("a tuple", lambda lm: put(h(lm), (V,)), "bad_argument", "a tuple is assigned", ".output[0]"),
    ("add a number", lambda lm: h(lm) + 1, "bad_argument", "not a vector", ""),
    ("the norm's dim", lambda lm: h(lm).norm(dim=1), "bad_argument", "norm over dim=1", "dim=-1"),
    ("a mean of prompts", lambda lm: h(lm).mean(dim=0), "bad_argument", "prompts never mix", "mean_diff"),
    ("no dim", lambda lm: h(lm).mean(dim=7), "bad_argument", "dim=7", "batch, token, column"),
    ("index computed", lambda lm: (h(lm) * 2)[:, -1], "bad_argument", "is indexed", "Index the place first"),
    (
        "write computed",
        lambda lm: put(h(lm) * 2, V),
        "bad_argument",
        "no place to write",
        "output of a module",
    ),
    ("save computed", lambda lm: (h(lm) * 2).save(), "not_here", "was computed", "save() the reads"),
    ("scale by rows", lambda lm: h(lm).__imul__(h(lm)), "bad_argument", "*= a value", "rows[:] = "),
    ("save logits", lambda lm: logits(lm).save(), "not_here", "not released", ".topk(k)"),
    ("logits here", lambda lm: np.asarray(logits(lm)), "not_here", "not a local array", ".topk(k)"),
    ("logits sum", lambda lm: logits(lm).sum(), "bad_argument", ".sum of", "docs/programs.md"),
    ("logits times", lambda lm: logits(lm) * 2, "bad_argument", "arithmetic", ".argmax(-1)"),
    ("raw token", lambda lm: logits(lm)[:, -1, 5].save(), "not_here", "raw logits", ".log_softmax(-1)"),
    (
        "raw values",
        lambda lm: logits(lm)[:, -1].topk(2).values,
        "not_here",
        "raw logits",
        ".log_softmax(-1).topk",
    ),
    ("over tokens", lambda lm: logits(lm).argmax(1), "bad_argument", "dim=1", "dim=-1"),
    ("twice", lambda lm: logits(lm).softmax(-1).softmax(-1), "bad_argument", "normalised already", "once"),
    (
        "two places",
        lambda lm: logits(lm)[:, -1, 5] - logits(lm)[:, -2, 5],
        "bad_argument",
        "two tokens at the same position",
        "one token each",
    ),
    ("a number less", lambda lm: logits(lm)[:, -1, 5] - 1, "bad_argument", "is taken from", ".topk(k)"),
    ("write logits", put_logits, "bad_argument", "logits are not written", "last norm"),
    (
        "named of a lens",
        lambda lm: lm.lm_head(lm.model.norm(h(lm)))[..., 5].save(),
        "not_here",
        "raw logits",
        ".topk(k)",
    ),
    (
        "position of a lens",
        lambda lm: lm.lm_head(lm.model.norm(h(lm)))[:, -1],
        "bad_argument",
        "positions of a lens",
        "Index the rows",
    ),
    ("save a module", lambda lm: lm.model.layers[1].save(), "bad_argument", "is a module", ".output.save()"),
    (
        "hook a module",
        lambda lm: lm.lm_head.register_forward_hook(1),
        "bad_argument",
        "is a module",
        ".output",
    ),
    ("assign a name", put_name, "bad_argument", "layers[1].weight is assigned", ".output or .input"),
    (
        "the output",
        lambda lm: lm.output.save(),
        "bad_argument",
        ".save of the model's output",
        "native trace",
    ),
    ("a result", lambda lm: lm.generator.output.save(), "bad_argument", "one pass", "lm.generate"),
    ("a list", lambda lm: nnsight.save([]), "bad_argument", "a list is not a value", "ordinary list"),
]


@pytest.mark.parametrize(
    ("write", "code", "reason", "step"), [c[1:] for c in INSIDE], ids=[c[0] for c in INSIDE]
)
def test_what_is_not_recorded(
    lm: LanguageModel, write: Callable[[LanguageModel], Any], code: str, reason: str, step: str
) -> None:
    with pytest.raises(trocar.ClientError) as caught, lm.trace("hello"):
        write(lm)
    assert caught.value.code == code
    assert reason in caught.value.reason
    assert step.lower() in caught.value.next_step.lower()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("edit", "model.generate(edits=...)"),
        ("session", "one after another"),
        ("clear_edits", "Leave it out"),
        ("tokenizer", "tokenize(text)"),
        ("dispatch", "docs/programs.md"),
        ("state_dict", "model.facts"),
    ],
)
def test_what_a_model_does_not_have(lm: LanguageModel, name: str, step: str) -> None:
    assert not hasattr(lm, name)
    with pytest.raises(trocar.ClientError) as caught:
        getattr(lm, name)
    assert caught.value.code == "bad_argument"
    assert step in caught.value.next_step


def test_a_tracer_has_no_cache_and_no_barrier(lm: LanguageModel) -> None:
    tracer = lm.trace()
    for name, step in (("cache", "model.capture"), ("barrier", "second"), ("invokes", "native trace")):
        with pytest.raises(trocar.ClientError) as caught:
            getattr(tracer, name)
        assert step in caught.value.next_step
    assert caught.value.closest == "invoke"
    for name in ("plan", "recorded"):
        with pytest.raises(trocar.ClientError) as early:
            getattr(tracer, name)
        assert early.value.path == name


def test_paths(lm: LanguageModel, gpt2: trocar.Model) -> None:
    cases = [
        (lm, lambda m: m.transformer.h[1].output, "unknown_site", "model.layers.1"),
        (LanguageModel(gpt2), lambda m: m.model.layers[1].output, "unknown_site", "transformer.h.1"),
        (LanguageModel(gpt2), lambda m: m.transformer.h[1].attn.c_attn.output, "ambiguous_site", "q.1"),
        (lm, lambda m: m.model.layers[9].output, "layer_out_of_range", "resid_post.3"),
        (lm, lambda m: m.model.layers[1].mpl.output, "unknown_site", "model.layers[1].mlp.output"),
        (lm, lambda m: len(m.model.norm), "unknown_site", None),
    ]
    for spelled, write, code, closest in cases:
        with pytest.raises(trocar.ProgramError) as caught, spelled.trace("a"):
            write(spelled)
        assert caught.value.code == code
        assert closest is None or (caught.value.closest or "").startswith(closest)


def nested(lm: LanguageModel) -> None:
    with lm.trace("a"):
        lm.trace("b")


def invoke_in_prompt(lm: LanguageModel) -> None:
    with lm.trace("a") as tracer:
        tracer.invoke("b")


def invoke_in_invoke(lm: LanguageModel) -> None:
    with lm.trace() as tracer, tracer.invoke("a"), tracer.invoke("b"):
        pass


def value_of_another(lm: LanguageModel) -> None:
    with lm.scan() as tracer:
        with tracer.invoke("a"):
            rows = h(lm)
            lm.logits[:, -1].argmax().save()
        with tracer.invoke("b"):
            h(lm)[:] = rows


def stop_late(lm: LanguageModel) -> None:
    with lm.trace("a") as tracer:
        lm.lm_head.output.argmax(-1).save()
        tracer.stop()


def step_compared(lm: LanguageModel) -> None:
    with lm.generate("a", max_new_tokens=3) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                pass


def steps_without_generation(lm: LanguageModel) -> None:
    with lm.trace("a") as tracer:
        tracer.iter[1]


def two_outputs(lm: LanguageModel) -> None:
    with lm.generate("a", max_new_tokens=3) as tracer, tracer.iter[:]:
        h(lm)[:, -1].save()


def two_outputs_of_logits(lm: LanguageModel) -> None:
    with lm.generate("a", max_new_tokens=3) as tracer, tracer.iter[:]:
        lm.lm_head.output[:, -1].argmax(-1).save()


def steps_that_differ(lm: LanguageModel) -> None:
    with lm.generate("a", max_new_tokens=5) as tracer:
        with tracer.iter[[1, 3]]:
            rows = h(lm)[:, -1]
        with tracer.iter[[0, 1, 3]]:
            lm.model.layers[2].output[0][:, -1] = rows


def after_replacement(lm: LanguageModel) -> None:
    with lm.trace("a"):
        rows = h(lm)
        lm.model.layers[1].output = V
        rows[:, -1] = 0


def write_after_replacement(lm: LanguageModel) -> None:
    with lm.trace("a"):
        rows = h(lm)
        lm.model.layers[1].output = V
        rows += V


WRITES: list[tuple[Callable[[LanguageModel], Any], str, str]] = [
    (nested, "a trace inside a trace", "End the first block"),
    (invoke_in_prompt, "a trace that has a prompt", "lm.trace() as tracer"),
    (invoke_in_invoke, "an invoke inside another", "End the first block"),
    (value_of_another, "another trace or invoke", "save() it there"),
    (stop_late, "after the last layer", "tracer.stop()"),
    (step_compared, "is compared with 2", "tracer.iter[2]"),
    (steps_without_generation, "without a generation", "lm.generate"),
    (two_outputs, "are two outputs", "tracer.iter[1:]"),
    (two_outputs_of_logits, "are two outputs", "tracer.iter[1:]"),
    (steps_that_differ, "meets a value of others", "same tracer.iter"),
    (after_replacement, "rows of before", ".clone()"),
    (write_after_replacement, "before the place was given others", "layer.output"),
    (lambda lm: lm.trace().invoke(), "without a prompt", "as a list"),
    (lambda lm: lm.trace().invoke("a", "b"), "several inputs", "as a list"),
    (lambda lm: lm.trace("a", "b"), "2 inputs", "one list"),
    (lambda lm: lm.trace({"input_ids": [[1]]}), "dictionary of tensors", "lists of token ids"),
    (lambda lm: lm.trace("a", remote=False), "remote=False", "runs on the server"),
    (lambda lm: lm.trace("a", blocking=False), "blocking=False", "gives a job"),
    (lambda lm: lm.generate("a", max_new_tokens=1, do_sample=True), "do_sample=True", "temperature"),
    (lambda lm: lm.generate("a", max_new_tokens=1, top_k=3), "not an option", ""),
    (lambda lm: lm.model.layers[1].output, "outside a trace", "lm.trace(prompt)"),
    (lambda lm: LanguageModel("gpt2"), "not a model of a trocar.Client", "served, not loaded"),
]


@pytest.mark.parametrize(("write", "reason", "step"), WRITES)
def test_traces_and_invokes(
    lm: LanguageModel, write: Callable[[LanguageModel], Any], reason: str, step: str
) -> None:
    with pytest.raises(trocar.ClientError) as caught:
        write(lm)
    assert caught.value.code == "bad_argument"
    assert reason in caught.value.reason
    assert step in caught.value.next_step
    assert lm._recording is None


def test_saved_rows_are_not_here(lm: LanguageModel) -> None:
    with lm.trace("hello"):
        saved = lm.model.layers[1].output[0].save()
        tokens = lm.lm_head.output[:, -1].argmax(-1).save()
        number = (lm.model.layers[1].output[0] @ V).save()
        assert "when the block ends" in repr(saved) + repr(number)
    cases: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: saved[0], "not_here", "saved.rows(at=-1)"),
        (lambda: np.asarray(saved), "not_here", "saved.fit(...)"),
        (lambda: saved.mean(0), "bad_argument", "native trace"),
        (lambda: saved.shape, "bad_argument", "width"),
        (lambda: saved + 1, "bad_argument", "later trace"),
        (lambda: torch.stack([saved]), "bad_argument", "Save each part"),
        (lambda: list(saved), "not_here", "Loop over layers"),
    ]
    for use, code, step in cases:
        with pytest.raises(trocar.ClientError) as caught:
            use()
        assert caught.value.code == code
        assert step in caught.value.next_step
    assert not hasattr(number, "texts")
    assert len(tokens.texts) == len(tokens) == 1
    assert number.shape == (5,)


def test_operands_from_the_left(lm: LanguageModel, model: trocar.Model, same: Any) -> None:
    vector = torch.from_numpy(V)
    with lm.trace("hello"):
        saved = lm.model.layers[1].output[0].save()
    with lm.scan("hello") as tracer:
        rows = lm.model.layers[2].output[0]
        rows[:] = vector - (vector + rows)
        rows[:] = saved + rows
        lm.model.layers[3].output[0] += vector
        (V @ rows[:, -1]).save()
    with model.trace("hello") as t:
        first = t.resid_post[2][:]
        t.resid_post[2][:] = vector - (first + vector)
        second = t.resid_post[2][:]
        t.resid_post[2][:] = second + saved
        t.resid_post[3][:] += vector
        t.save("saved0", t.score(V @ t.resid_post[2][-1]))
    same(tracer.recorded, t.recorded)


def test_prompts_as_ids(lm: LanguageModel) -> None:
    for prompts in ([65, 66], torch.tensor([[65, 66]]), np.array([[65, 66]])):
        with lm.scan(prompts) as tracer:
            lm.logits[:, -1].argmax().save()
        assert tracer.recorded.request.prompts == ((65, 66),)


def test_hooks(hooked: HookedModel) -> None:
    def run(hook: Any, name: Any = "blocks.1.hook_resid_post") -> Any:
        return lambda: hooked.run_with_hooks("hello", fwd_hooks=[(name, hook)])

    def branch(value: Any, hook: Any) -> Any:
        if value[:, -1]:
            return value
        return None

    cases: list[tuple[Callable[[], Any], str, str, str]] = [
        (run(branch), "not_here", "no branches on values", "gate"),
        (run(lambda x, hook: torch.relu(x)), "bad_argument", "torch.relu", "methods"),
        (run(lambda x, hook: x > 0), "bad_argument", "compared", "gate="),
        (run(lambda x, hook: hook.ctx), "bad_argument", ".ctx of hook", "variables of your own"),
        (run(lambda x, hook: hook.layer(), "hook_embed"), "bad_argument", "in no layer", "layers"),
        (run(lambda x, hook: 1), "bad_argument", "1 is assigned", "numpy.full"),
        (run(5), "bad_argument", "5 is no hook", 'trocar.edit.add("*", v)'),
        (run(trocar.edit.zero("resid_post.2")), "bad_argument", "its edit at resid_post.2", '"*"'),
        (run(lambda p, hook: p, "blocks.1.attn.hook_pattern"), "bad_argument", "no rows", "t.knockout"),
        (run(lambda p, hook: p, "unembed.hook_out"), "bad_argument", "no rows", "final_norm"),
        (run(lambda z, hook: z[1, -1]), "bad_argument", "there is one: 0", "[0, position]"),
        (run(lambda x, hook: 0, lambda name: False), "bad_argument", "accepts no hook", "hook_embed"),
        (lambda: hooked.run_with_hooks("a", bwd_hooks=[("x", 1)]), "bad_argument", "gradients", "logit_diff"),
        (lambda: hooked.hooks(bwd_hooks=[("x", 1)]).__enter__(), "bad_argument", "gradients", "logit_diff"),
        (lambda: hooked("a", return_type="both"), "bad_argument", "return_type='both'", "top(k)"),
        (lambda: hooked("a")[0, -1], "not_here", "nothing has run", ".top(k)"),
        (lambda: np.asarray(hooked("a")), "not_here", "not a local array", ".top(k)"),
        (lambda: hooked("a").argmax(-1), "bad_argument", ".argmax of", ".top(k)"),
        (lambda: hooked("a").backward(), "bad_argument", "gradients", "logit_diff"),
        (lambda: hooked.add_hook("x", 1), "bad_argument", ".add_hook", "fwd_hooks=[...]"),
        (lambda: hooked.W_U, "bad_argument", ".W_U", "never leave"),
        (lambda: hooked.to_tokens("a"), "bad_argument", ".to_tokens", "tokenize(text)"),
        (lambda: HookedModel("gpt2"), "bad_argument", "not a model of", "served, not loaded"),
        (
            lambda: hooked.run_with_cache("a", stop_at_layer=1, return_type="loss"),
            "bad_argument",
            "stops before the logits",
            "stop_at_layer",
        ),
    ]
    for write, code, reason, step in cases:
        with pytest.raises(trocar.ClientError) as caught:
            write()
        assert caught.value.code == code
        assert reason in caught.value.reason, caught.value
        assert step in caught.value.next_step, caught.value


def test_caches(hooked: HookedModel) -> None:
    _, cache = hooked.run_with_cache(
        "hello", names_filter=["resid_post.1", "blocks.1.attn.hook_z"], return_type=None
    )
    cases: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: cache["mlp_out", 1], "was not cached", "names_filter"),
        (lambda: cache["pattern", 1], "never stored", "t.pattern"),
        (lambda: cache["scale", 1, "ln1"], "is no key", 'cache["resid_post", 5]'),
        (lambda: cache.decompose_resid, ".decompose_resid", "attn_out, mlp_out"),
        (lambda: cache["z", 1][:, :, 0], "some columns", "whole rows"),
        (lambda: cache["resid_post", 1][1], "there is one: 0", "[:, position]"),
    ]
    for use, reason, step in cases:
        with pytest.raises(trocar.ClientError) as caught:
            use()
        assert reason in caught.value.reason
        assert step in caught.value.next_step
    with pytest.raises(trocar.ProgramError) as absent:
        cache["attn_scores", 1]
    assert absent.value.code == "unknown_site"
    assert hooks.Cache is type(cache)
