"""The headline: a compromised worker knows the weights and tries to say them, and no more comes out than is charged.

It hides bits in every place that an answer has, one after another, until the budget is gone. The attacker reads
the raw answers. What both together got across, and what the answers could have said at all, is compared with the
ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stuffing_room as s
import worker_room as w

from trocar.cli.attack_room import without_days
from trocar.engine.protocol import Generated, Task, TaskResult

LIMIT_BITS = 30_000
OVERHEAD_ROUNDS = 12


@pytest.fixture
def cell(tmp_path: Path, tiny_of: Callable[..., Any]) -> Iterator[w.Cell]:
    loaded = tiny_of(w.MODEL, open_weights=False, weight_bits=1000 * LIMIT_BITS)
    with w.cell(loaded, tmp_path, without_days()) as made:
        yield made


def secret_bits(count: int, seed: int = 0) -> s.Bits:
    found: s.Bits = np.random.default_rng(seed).integers(0, 2, count).tolist()
    return found


def attempt(cell: w.Cell, wire: w.Wire, mode: s.Mode, bits: s.Bits) -> tuple[w.Heard, int]:
    """One run in one mode; the bits that came across are those beyond what guessing gives."""
    cell.engine.bend = lambda task, result: mode.hide(bits, task, result)
    cell.engine.before = lambda task: mode.before(bits, task)
    try:
        answer = wire.run(mode.program)
        read = mode.read(wire, answer)
    except (KeyError, ValueError, IndexError, TypeError):
        read = []  # the answer is not of the shape that was hoped for
    finally:
        cell.behave()
    return answer, gained(bits, read)


def gained(sent: s.Bits, read: s.Bits) -> int:
    """Right bits less wrong ones: random bits of the right length gain nothing."""
    if len(read) != len(sent):
        return 0
    right = sum(a == b for a, b in zip(sent, read, strict=True))
    return max(0, 2 * right - len(sent))


def test_recovered_bits_are_charged(cell: w.Cell) -> None:
    """Every mode once, then the one that gives most for its price until the budget is gone."""
    wire, recovered, worth = cell.wire(), 0, dict[str, float]()
    for mode in s.MODES:
        before = wire.budget()["spent_bits"]
        _, got = attempt(cell, wire, mode, secret_bits(mode.width))
        recovered += got
        worth[mode.name] = got / max(1, wire.budget()["spent_bits"] - before)
    best, runs = max(s.MODES, key=lambda m: worth[m.name]), 0
    while True:
        answer, got = attempt(cell, wire, best, secret_bits(best.width, runs))
        if answer.status == 403:
            break
        recovered, runs = recovered + got, runs + 1
    budget = wire.budget()
    assert runs > 3
    assert recovered <= budget["spent_bits"] <= budget["limit_bits"], (best.name, worth)
    assert budget["limit_bits"] == LIMIT_BITS
    assert budget["left_bits"] < wire.plan(best.program)["cost"]["total_bits"]


@pytest.mark.parametrize("mode", s.MODES, ids=lambda m: m.name)
def test_no_mode_gives_more_than_its_runs_cost(cell: w.Cell, mode: s.Mode) -> None:
    """Also a mode alone, however often it is used, gives less than its own charges."""
    wire, got = cell.wire(), 0
    for seed in range(4):
        got += attempt(cell, wire, mode, secret_bits(mode.width, seed))[1]
    assert got <= wire.budget()["spent_bits"]


def test_the_modes_work_where_bits_are_paid_for(cell: w.Cell) -> None:
    """The comparison above can fail: what is charged for does carry the worker's bits."""
    wire = cell.wire()
    got = {m.name: attempt(cell, wire, m, secret_bits(m.width, 5))[1] for m in s.MODES}
    for name in ("levels of numbers", "truth values", "token ids", "texts", "lengths of texts"):
        width = next(m.width for m in s.MODES if m.name == name)
        assert got[name] == width, name


PROGRAMS = {
    "score": w.SCORE,
    "truth": w.TRUTH,
    "lens": w.LENS,
    "logprobs": w.LOGPROBS,
    "metric": w.METRIC,
    "pattern": w.PATTERN,
    "text": w.TEXT,
    "edit": w.EDIT,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_that_varies_is_charged(cell: w.Cell, name: str) -> None:
    """With every charged place full of noise, the rest of an answer is the same, and the noise is paid for."""
    wire = cell.wire()
    prices = s.Prices.of(wire)
    rng = np.random.default_rng(1)
    cell.engine.bend = lambda _task, result: noisy(result, rng)
    answers = [wire.run(PROGRAMS[name]) for _ in range(6)]
    assert {a.status for a in answers} == {200}
    assert len({s.fixed(a.json) for a in answers}) == 1
    assert len({w.plain(str(a.json["outputs"])) for a in answers}) > 1
    for answer in answers:
        assert prices.admissible(answer.json) <= answer.charged_bits


def noisy(result: TaskResult, rng: Any) -> TaskResult:
    """Noise in every number and id."""

    def bent(o: Any) -> Any:
        change: dict[str, Any] = {}
        for field in ("scores", "logprobs", "probs", "values"):
            if hasattr(o, field):
                change[field] = rng.choice([-2.0, -1.0, 0.0, 0.5], np.shape(getattr(o, field))).astype(
                    np.float32
                )
        if isinstance(getattr(o, "ids", None), np.ndarray):
            change["ids"] = rng.integers(0, 256, o.ids.shape)
        return replace(o, **change)

    edits = tuple(
        replace(e, norm_before=float(rng.normal()), norm_after=float(rng.normal())) for e in result.edits
    )
    outputs = {n: bent(o) for n, o in result.outputs.items()}
    if isinstance(outputs.get("out"), Generated):
        ids = tuple(tuple(rng.integers(0, 256, rng.integers(1, 5)).tolist()) for _ in range(2))
        return s.told(replace(result, edits=edits), ids, (s.END, None))
    return replace(result, outputs=outputs, edits=edits)


def test_a_number_has_no_more_values_than_its_bits(cell: w.Cell) -> None:
    """Whatever a worker gives, the distinct numbers of one output are at most two to the power of their price."""
    wire = cell.wire()
    prices = s.Prices.of(wire)
    prompts = [np.random.default_rng(2).integers(0, 250, 100).tolist()] * 5
    cell.engine.bend = lambda _task, r: s.out(r, scores=np.linspace(-1, 1, 500, dtype=np.float32) ** 3)
    answer = wire.run({**w.SCORE, "prompts": prompts})
    values = set(answer.json["outputs"]["out"]["scores"])
    assert len(values) <= 2**prices.number_bits
    assert 500 * prices.number_bits <= answer.charged_bits


def test_failing_is_charged(cell: w.Cell) -> None:
    """A run that fails says one bit, and costs the overhead."""
    wire = cell.wire()
    said = secret_bits(OVERHEAD_ROUNDS)
    for bit in said:

        def maybe(_task: Task, result: TaskResult, bit: int = bit) -> TaskResult:
            if bit:
                raise ValueError
            return result

        cell.engine.bend = maybe
        wire.run(w.SCORE)
    cell.behave()
    ends = [h for h in wire.heard if h.status >= 400 or '"outputs"' in h.body.decode()]
    heard = [int(h.status != 200) for h in ends]
    overhead = wire.plan(w.SCORE)["cost"]["bits_out"]["overhead"]
    assert heard == said
    assert wire.budget()["spent_bits"] >= overhead * len(said)
