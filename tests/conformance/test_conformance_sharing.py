"""Behaviours 13, 20, 37 and 38: many requests in one forward pass, and none of them can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bench_room import Ask, Bench, Shelf, capture, greedy, logprobs, ok, read, text
from compare_room import against_hooks, changed, close, same_bits
from users_room import TOKENS, V, bare, eight

from trocar import errors
from trocar.engine.protocol import TaskResult
from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation


def test_c13_isolation(bench: Bench) -> None:
    """A zeroes a layer, B does nothing: B is as alone and as the bare model, A is not."""
    site = f"resid_post.{bench.middle}"
    zero = ops.EditSet(id="e", site=site, at="prompt[*]", value="zero")
    a = Ask([zero, logprobs(TOKENS)], bench.prompts[:1], tenant="a")
    b = Ask([read(site), capture("r"), logprobs(TOKENS)], bench.prompts[:1], tenant="b")
    edited, beside = (ok(x) for x in bench.together(a, b))
    shared = b.sinks["kept"].rows(site)
    against_hooks(bench, b, beside, "B beside an edited A")
    assert changed(bench, a, edited) > 1e-2
    alone = bench.alone(b)
    assert same_bits(alone.outputs["lp"].logprobs, beside.outputs["lp"].logprobs)
    assert torch.equal(b.sinks["kept"].rows(site), shared)


def test_eight_users_in_one_batch_equal_each_alone(bench: Bench) -> None:
    """Within tolerance of the hooks, and bit by bit what each gets alone."""
    asks = eight(bench)
    before = bench.engine.stats()
    mixed = [ok(x) for x in bench.together(*asks)]
    after = bench.engine.stats()
    assert after.most_requests >= 8
    for number, (ask, result) in enumerate(zip(asks, mixed, strict=True)):
        against_hooks(bench, ask, result, "eight users")
        assert changed(bench, ask, result) > 1e-2, number
        alone = bench.alone(ask)
        close("eight users against alone", result.outputs["lp"].logprobs, alone.outputs["lp"].logprobs)
        assert [e.rows for e in result.edits] == [e.rows for e in alone.edits]
        if "text" in result.outputs:
            assert result.outputs["text"] == alone.outputs["text"]
    alone_forwards = bench.engine.stats().forwards - after.forwards
    assert after.forwards - before.forwards < alone_forwards


def test_a_batch_changes_no_bit(bench: Bench) -> None:
    asks = eight(bench)
    mixed = [ok(x).outputs["lp"].logprobs for x in bench.together(*asks)]
    for ask, shared in zip(asks, mixed, strict=True):
        assert same_bits(bench.alone(ask).outputs["lp"].logprobs, shared), ask.tenant


def _ninth(bench: Bench) -> Ask:
    site = f"resid_post.{bench.layers - 1}"
    return Ask([read(site, "all"), capture("r"), logprobs(TOKENS, "all"), text()], bench.prompts, greedy(4))


def test_neighbours_of_eight_edits_keep_their_bits(bench: Bench) -> None:
    """The same eight places in the batch, edited and not: the ninth request sees no difference, in any bit."""
    ninth, site = _ninth(bench), f"resid_post.{bench.layers - 1}"
    edited = ok(bench.together(*eight(bench), ninth)[-1])
    rows = ninth.sinks["kept"].rows(site)
    plain = ok(bench.together(*[bare(a) for a in eight(bench)], ninth)[-1])
    assert same_bits(edited.outputs["lp"].logprobs, plain.outputs["lp"].logprobs)
    assert edited.outputs["text"] == plain.outputs["text"]
    assert torch.equal(ninth.sinks["kept"].rows(site), rows)


POISON = {"nan": float("nan"), "inf": float("inf"), "1e38": 1e38, "overflow": 9e6}


@pytest.mark.parametrize("poison", POISON)
def test_c38_non_finite_edits_stay_with_their_author(bench: Bench, poison: str) -> None:
    """One of nine writes NaN, Inf or 1e38: it is refused by name, and the others keep every bit."""
    site = f"resid_post.{bench.middle}"
    vector = torch.full((bench.width(site),), POISON[poison])
    edit = ops.EditAdd(id="e", site=site, at="all", value="v", coef=1e6 if poison == "overflow" else 1.0)
    a = Ask([V, edit, logprobs(TOKENS), text()], bench.prompts[:2], greedy(3), vectors={"v": vector})
    ninth, rows_at = _ninth(bench), f"resid_post.{bench.layers - 1}"
    refused, *others, ran = bench.together(a, *eight(bench), ninth)
    assert isinstance(refused, TrocarError)
    assert (refused.code, refused.path) == ("edit_not_finite", "program.nodes[1]")
    rows = ninth.sinks["kept"].rows(rows_at)
    _, *unpoisoned, quiet = bench.together(bare(a), *eight(bench), ninth)
    assert same_bits(ok(ran).outputs["lp"].logprobs, ok(quiet).outputs["lp"].logprobs)
    assert torch.equal(ninth.sinks["kept"].rows(rows_at), rows)
    for mine, theirs in zip(others, unpoisoned, strict=True):
        assert same_bits(ok(mine).outputs["lp"].logprobs, ok(theirs).outputs["lp"].logprobs)


def test_c38_every_kind_of_edit_is_held_finite(family: Bench) -> None:
    """Whatever op makes the number, and at the last step of a text too."""
    site, width = f"resid_post.{family.middle}", family.width("resid_post")
    huge, nan = torch.full((width,), 1e38), torch.full((width,), float("nan"))
    arrays = {"v": huge, "n": nan, "down": torch.full((width, 1), 1e30), "up": torch.full((1, width), 1e30)}
    tensors = [ops.Tensor(id=name, name=name) for name in arrays]
    edits = [
        ops.EditSet(id="e", site=site, value="n"),
        ops.EditProjectOut(id="e", site=site, value="v"),
        ops.EditClamp(id="e", site=site, value="n", low=0.0),
        ops.EditAffine(id="e", site=site, down="down", up="up"),
        ops.EditAdd(id="e", site=site, value="v", at="gen[1]"),
        ops.EditAdd(id="e", site=f"z.{family.middle}", value="h", heads=(0,)),
    ]
    beside = Ask([text(), logprobs(TOKENS, "all")], family.prompts, greedy(3))
    alone = family.alone(beside)
    for edit in edits:
        head = [ops.Tensor(id="h", name="h")]
        vectors = {**arrays, "h": torch.full((int(family.facts.d_head),), 1e38)}
        ask = Ask([*tensors, *head, edit, text()], family.prompts[:2], greedy(3), vectors=vectors)
        refused, ran = family.together(ask, beside)
        assert isinstance(refused, TrocarError), edit
        assert refused.code == "edit_not_finite"
        assert same_bits(ok(ran).outputs["lp"].logprobs, alone.outputs["lp"].logprobs)


class Failing:
    """A sink that cannot take anything."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def append(self, *_: Any) -> None:
        raise self._error


def _captures(bench: Bench, error: Exception) -> Ask:
    nodes = [read(f"resid_post.{bench.middle}", "all"), capture("r")]
    return Ask(nodes, bench.prompts[:1] * 3, greedy(4), own={"kept": Failing(error)})


@pytest.mark.parametrize(
    "fault", [RuntimeError("boom"), OSError(5, "input/output"), KeyError("lost"), ValueError("bad")]
)
def test_c37_a_failing_request_fails_alone(small: Bench, fault: Exception) -> None:
    """Whatever a sink raises ends its own request; the neighbour and the next request are served."""
    b = Ask([text(), logprobs(TOKENS, "all")], small.prompts, greedy(4))
    failed, ran = small.together(_captures(small, fault), b)
    assert isinstance(failed, TrocarError)
    assert failed.code == "internal"
    assert "boom" not in str(failed)
    assert ok(ran).outputs["text"] == small.alone(b).outputs["text"]
    assert small.engine.check() == []


def test_c37_a_refusal_of_the_sink_keeps_its_code(small: Bench) -> None:
    full = _captures(small, errors.refuse("disk_full", "", "no room"))
    failed, ran = small.together(full, Ask([text()], small.prompts, greedy(4)))
    assert isinstance(failed, TrocarError)
    assert failed.code == "disk_full"
    assert isinstance(ran, TaskResult)


def test_c37_a_progress_callback_that_raises_fails_alone(small: Bench) -> None:
    def progress(_done: int) -> None:
        raise RuntimeError("boom")

    plain = Ask([text()], small.prompts, greedy(2))
    failed, ran = small.together(Ask([text()], small.prompts[:1], greedy(2), progress=progress), plain)
    assert isinstance(failed, TrocarError)
    assert failed.code == "internal"
    assert small.alone(plain) == ran


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_c37_logits_that_are_not_finite_fail_alone(limited: Any, temperature: float) -> None:
    """Writes within the limit can still overflow later; sampling from NaN must not reach the neighbours."""
    bench = limited()
    generation = Generation(max_new_tokens=3, temperature=temperature, stop_at_eos=False)
    a = Ask([text()], [(7, 7, 7)], generation)
    b = Ask([text()], bench.prompts, greedy(3))
    before = bench.alone(b)
    readout = bench.engine._body.readout
    plain, poisoned = readout.head, []

    def head(rows: torch.Tensor) -> torch.Tensor:
        out = plain(rows).clone()
        if not poisoned:
            out[0] = float("nan")  # rows of a step stand in the order of the requests
        poisoned.append(1)
        return out

    object.__setattr__(readout, "head", head)
    failed, ran = bench.together(a, b)
    object.__setattr__(readout, "head", plain)
    assert poisoned
    assert isinstance(failed, TrocarError)
    assert failed.code == "result_not_finite"
    assert ok(ran).outputs["text"] == before.outputs["text"]


def test_shelves_are_the_tests_own() -> None:
    """The harness itself: rows come back ordered by prompt, then position."""
    shelf = Shelf()
    tags = type(
        "T", (), {"prompts": np.array([1, 0]), "positions": np.array([0, 3]), "token_ids": np.array([7, 8])}
    )
    shelf.append({"s": np.array([[1.0], [2.0]], dtype=np.float32)}, tags)
    assert shelf.keys().tolist() == [[0, 3, 8], [1, 0, 7]]
    assert shelf.rows("s").tolist() == [[2.0], [1.0]]
    assert shelf.rows("s", 1).tolist() == [[1.0]]
