"""Programs nobody thought of: Hypothesis writes several, one batch runs them, the hooks run each prompt alone."""

from __future__ import annotations

from typing import Any

import torch
from bench_room import Ask, Bench, capture, close, greedy, logprobs, read, text
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from reference import logprobs as reference_logprobs
from reference import solo

from trocar.engine.protocol import TaskResult
from trocar.errors import ProgramError
from trocar.graph import ops

TOKENS = (1, 17, 42, 99)
SITES = (
    "embeddings",
    "resid_pre.1",
    "attn_in.1",
    "q.1",
    "k.2",
    "v.1",
    "z.1",
    "attn_out.1",
    "resid_mid.1",
    "mlp_in.2",
    "mlp_act.1",
    "mlp_out.2",
    "resid_post.0",
    "resid_post.2",
    "final_norm",
)
TIE = 1e-3


@st.composite
def requests(draw: st.DrawFn, small: Bench) -> Ask:
    """Prompts, a generation, and nodes that mostly pass the checker."""
    token = st.integers(0, 255)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3))
    most = draw(st.sampled_from([0, 0, 1, 3]))
    places = ["prompt[*]", "prompt[-1]", "prompt[0]", "prompt[:-1]", "prompt[1:]"]
    places += ["all", "gen[*]", "gen[0]", "gen[1:]"] if most else []
    nodes: list[Any] = []
    vectors: dict[str, torch.Tensor] = {}
    outputs: list[Any] = []
    for i in range(draw(st.integers(1, 4))):
        site, at = draw(st.sampled_from(SITES)), draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["scale", "zero", "vector", "project", "mean", "moved", "scored"]))
        if kind in ("vector", "project", "scored"):
            nodes.append(ops.Tensor(id=f"v{i}", name=f"v{i}"))
            vectors[f"v{i}"] = small.vector(site, 3.0, seed=draw(st.integers(0, 50)))
        if kind == "scale":
            nodes.append(
                ops.EditScale(id=f"e{i}", site=site, at=at, by=draw(st.sampled_from([-1.0, 0.0, 0.5, 2.0])))
            )
        elif kind == "zero":
            nodes.append(ops.EditSet(id=f"e{i}", site=site, at=at, value="zero"))
        elif kind == "vector":
            edit = draw(st.sampled_from([ops.EditAdd, ops.EditSet]))
            nodes.append(edit(id=f"e{i}", site=site, at=at, value=f"v{i}"))
        elif kind == "project":
            nodes.append(ops.EditProjectOut(id=f"e{i}", site=site, at=at, value=f"v{i}"))
        elif kind == "scored":
            nodes += [read(site, at, f"r{i}"), ops.Dot(id=f"d{i}", a=f"r{i}", b=f"v{i}")]
            outputs += [ops.Score(id=f"s{i}", of=f"d{i}"), capture(f"r{i}", name=f"k{i}")]
        else:
            source = draw(st.sampled_from([s for s in SITES if small.width(s) == small.width(site)]))
            whole = kind == "mean"
            nodes.append(read(source, draw(st.sampled_from(places[:5])) if whole else at, f"r{i}"))
            nodes.append(
                ops.Mean(id=f"x{i}", of=f"r{i}") if whole else ops.Scale(id=f"x{i}", of=f"r{i}", by=0.5)
            )
            edit = draw(st.sampled_from([ops.EditAdd, ops.EditSet]))
            nodes.append(edit(id=f"e{i}", site=site, at=at, value=f"x{i}"))
    tail = [logprobs(TOKENS, "all")] if most else [logprobs(TOKENS)]
    return Ask([*nodes, *outputs, *tail, *([text()] if most else [])], prompts, greedy(most), vectors=vectors)


def _legal(small: Bench, ask: Ask) -> bool:
    try:
        small.task(ask)
    except ProgramError:
        return False
    return True


def _compare(small: Bench, ask: Ask, result: TaskResult) -> None:
    lp = result.outputs["lp"]
    for i, prompt in enumerate(ask.prompts):
        run = solo(
            small.model, ask.nodes, prompt, ask.constants(i), max_new_tokens=ask.generation.max_new_tokens
        )
        chosen = run.last.logits[len(prompt) - 1 : len(prompt) - 1 + len(run.ids)].topk(2).values
        assume(bool(((chosen[:, 0] - chosen[:, 1]) > TIE).all()))  # else rounding decides the token
        if run.ids:
            assert result.outputs["text"].ids[i] == run.ids
        theirs = reference_logprobs(run.last.logits)[:, list(TOKENS)]
        close("random programs, logprobs", lp.logprobs[lp.tags.prompts == i], theirs)
        for node in ask.nodes:
            if isinstance(node, ops.Score):
                found = result.outputs[node.id]
                of = run.of(next(n.at for n in ask.nodes if n.id == f"r{node.id[1:]}"))
                at = of.positions(node.of)
                assert found.tags.positions[found.tags.prompts == i].tolist() == at
                theirs = of.value(node.of)
                size = max(1.0, float(theirs.abs().max()) if len(theirs) else 1.0)
                close(
                    "random programs, scores, relative",
                    found.scores[found.tags.prompts == i] / size,
                    theirs / size,
                )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_random_programs_in_one_batch_equal_the_hooks(small: Bench, data: st.DataObject) -> None:
    drawn = [data.draw(requests(small)) for _ in range(3)]
    asks = [ask for ask in drawn if _legal(small, ask)]
    assume(asks)
    event(f"{len(asks)} requests in one batch")
    before = small.engine.stats().forwards
    results = small.together(*asks)
    most = max(a.generation.max_new_tokens for a in asks)
    assert small.engine.stats().forwards - before == 1 + most
    for ask, result in zip(asks, results, strict=True):
        assert isinstance(result, TaskResult), result
        _compare(small, ask, result)
