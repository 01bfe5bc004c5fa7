"""Every field that a worker can bend is closed: whatever it holds, what the attacker sees stays the same.

Each case runs one innocent program four times. The worker hides another secret in one place each time; every byte
of every answer is compared, less what the server itself draws at random. Places that are charged for (numbers,
token ids, how many of them) are counted in `test_attack_worker`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_room as w

from trocar import errors
from trocar.codes import CODES
from trocar.engine.protocol import Captured, Generated, Lensed, Metered, RowTags, Scored, Task, TaskResult

SECRETS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory, tiny_of: Callable[..., Any]) -> Iterator[w.Cell]:
    loaded = tiny_of(w.MODEL, open_weights=False, weight_bits=4_000_000_000)
    with w.cell(loaded, tmp_path_factory.mktemp("cell")) as made:
        yield made


@dataclass(frozen=True)
class Place:
    """One place to hide something.

    Attributes:
        bend: `(secret, result) -> result`.
    """

    name: str
    program: dict[str, Any]
    bend: Callable[[int, TaskResult], TaskResult]


def out(change: Callable[[int, Any], Any]) -> Callable[[int, TaskResult], TaskResult]:
    """Bends the output `out`."""
    return lambda secret, result: replace(
        result, outputs={**result.outputs, "out": change(secret, result.outputs["out"])}
    )


def tags(change: Callable[[int, RowTags], RowTags]) -> Callable[[int, TaskResult], TaskResult]:
    return out(lambda secret, o: replace(o, tags=change(secret, o.tags)))


def field(name: str, change: Callable[[int, Any], Any]) -> Callable[[int, TaskResult], TaskResult]:
    return out(lambda secret, o: replace(o, **{name: change(secret, getattr(o, name))}))


def effect(**change: Callable[[int, Any], Any]) -> Callable[[int, TaskResult], TaskResult]:
    def bend(secret: int, result: TaskResult) -> TaskResult:
        first, *rest = result.edits
        bent = {name: f(secret, getattr(first, name)) for name, f in change.items()}
        return replace(result, edits=(replace(first, **bent), *rest))

    return bend


def cut(secret: int, o: Any) -> Any:
    """Leaves rows out."""
    keep = len(o.tags.prompts) - secret
    kept = RowTags(
        o.tags.prompts[:keep], o.tags.positions[:keep], o.tags.token_ids[:keep], o.tags.phases[:keep]
    )
    return replace(o, tags=kept, scores=o.scores[:keep])


def ordered(secret: int, result: TaskResult) -> TaskResult:
    """Says the same in another order."""
    orders = list(itertools.permutations(result.outputs.items()))
    return replace(result, outputs=dict(orders[secret % len(orders)]))


def left_out(secret: int, result: TaskResult) -> TaskResult:
    names = ("out", "more")
    kept = {
        n: o for i, (n, o) in enumerate(zip(names, result.outputs.values(), strict=True)) if secret >> i & 1
    }
    return replace(result, outputs=kept)


def extra(secret: int, result: TaskResult) -> TaskResult:
    return replace(result, outputs={**result.outputs, f"x{secret}": result.outputs["out"]})


def another_kind(secret: int, o: Scored) -> Any:
    n = len(o.scores)
    ids = np.zeros((1, n, 1), dtype=np.int64)
    kinds = (
        Metered(np.zeros(n, dtype=np.float32)),
        Captured((1, 1)),
        Generated(((1,), (1,)), (True, True)),
        Lensed(o.tags, ids, np.zeros((1, n, 1), dtype=np.float32)),
    )
    return kinds[secret - 1]


def turned(secret: int, o: Any) -> Any:
    """Gives the rows' tags in another order, as if rows had changed places."""
    order = np.roll(np.arange(len(o.tags.prompts)), secret)
    moved = RowTags(o.tags.prompts[order], o.tags.positions[order], o.tags.token_ids[order], o.tags.phases)
    return replace(o, tags=moved)


PLACES = (
    Place("positions of rows", w.SCORE, tags(lambda s, t: replace(t, positions=t.positions + 1000 * s))),
    Place("prompts of rows", w.SCORE, tags(lambda s, t: replace(t, prompts=t.prompts + 1000 * s))),
    Place("order of rows", w.SCORE, out(turned)),
    Place("tokens of rows", w.SCORE, tags(lambda s, t: replace(t, token_ids=t.token_ids + s))),
    Place("number of rows", w.SCORE, out(cut)),
    Place("positions of a lens", w.LENS, tags(lambda s, t: replace(t, positions=t.positions + s))),
    Place("positions of logprobs", w.LOGPROBS, tags(lambda s, t: replace(t, positions=t.positions - s))),
    Place("prompts of a pattern", w.PATTERN, tags(lambda s, t: replace(t, prompts=t.prompts + s))),
    Place("positions of generated rows", w.GENERATED, tags(lambda s, t: replace(t, positions=t.positions + s))),
    Place("width of a lens", w.LENS, out(lambda s, o: replace(o, ids=o.ids[..., :s % 3], logprobs=o.logprobs[..., :s % 3]))),
    Place("ids outside the vocabulary", w.LENS, field("ids", lambda s, ids: ids + 2**40 * s)),
    Place("negative ids", w.LENS, field("ids", lambda s, ids: -s - ids)),
    Place("number of logprobs", w.LOGPROBS, field("logprobs", lambda s, x: x[:, : s % 3])),
    Place("number of metrics", w.METRIC, field("values", lambda s, x: x[: s % 2])),
    Place("shape of a pattern", w.PATTERN, field("probs", lambda s, x: x.reshape(len(x), -1, 1) if s % 2 else x[:, :1])),
    Place("ids of a text outside the vocabulary", w.TEXT, field("ids", lambda s, ids: ((10**6 + s,), *ids[1:]))),
    Place("number of texts", w.TEXT, out(lambda s, o: Generated(o.ids[: s % 2], o.finished[: s % 2]))),
    Place("texts longer than asked for", w.TEXT, field("ids", lambda s, ids: ((s,) * (20 + s), *ids[1:]))),
    Place("number of finish marks", w.TEXT, field("finished", lambda s, f: f * s)),
    Place("rows that an edit wrote", w.EDIT, effect(rows=lambda s, _: s * 10**12)),
    Place("rows that a capture says it has", w.CAPTURE, field("rows_per_prompt", lambda s, _: (s * 10**12, s))),
    Place("number of prompts of a capture", w.CAPTURE, field("rows_per_prompt", lambda s, r: r * s)),
    Place("kind of an output", w.SCORE, out(another_kind)),
    Place("order of outputs", w.TWO_SCORES, ordered),
    Place("outputs left out", w.TWO_SCORES, left_out),
    Place("outputs nobody asked for", w.SCORE, extra),
    Place("effects nobody asked for", w.SCORE, lambda s, r: replace(r, edits=tuple(r.edits) * s)),
)  # fmt: skip


def look(cell: w.Cell, program: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that the attacker sees of one run, and of the handle that it leaves."""
    wire = cell.wire()
    wire.run(program)
    handles = wire.ask("GET", "/v1/handles").json["handles"]
    for handle in handles:
        wire.ask("GET", f"/v1/handles/{handle['handle']}")
        wire.ask("DELETE", f"/v1/handles/{handle['handle']}")
    cell.worker.behave()
    return tuple(w.seen(h) for h in wire.heard if h.status != 202)


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.name)
def test_a_place_is_closed(cell: w.Cell, place: Place) -> None:
    views = []
    for secret in SECRETS:
        cell.worker.bend = lambda _task, result, secret=secret: place.bend(secret, result)
        views.append(look(cell, place.program))
    assert len(set(views)) == 1, difference(views)


def difference(views: list[Any]) -> str:
    """The first answers that differ, for the reader of a failure."""
    first = views[0]
    other = next(v for v in views if v != first)
    pairs = [(a, b) for a, b in zip(first, other, strict=False) if a != b]
    return "\n".join(f"{a}\n{b}" for a, b in pairs[:1])[:2000] or "different numbers of answers"


@pytest.mark.parametrize(
    "raised",
    [
        lambda s: errors.refuse("edit_missed", f"w{s}", f"the weights are {s}"),
        lambda s: errors.refuse("result_not_finite", "", "", next_step=f"{s}"),
        lambda s: errors.full(f"{s} requests are waiting", 100.0 * s),
        lambda s: ValueError(f"w{s}"),
        KeyError,
    ],
    ids=["reason and path", "next step", "seconds to wait", "another exception", "another class"],
)
@pytest.mark.parametrize("when", ["on arrival", "afterwards"])
def test_errors_say_nothing(cell: w.Cell, raised: Callable[[int], BaseException], when: str) -> None:
    """Failing at all is one of two answers, and the overhead pays for it; how it fails must not matter."""

    def fail(secret: int, *_: Any) -> Any:
        raise raised(secret)

    views = []
    for secret in SECRETS:
        if when == "on arrival":
            cell.worker.before = partial(fail, secret)
        else:
            cell.worker.bend = partial(fail, secret)
        views.append(look(cell, w.SCORE))
    assert len(set(views)) == 1, difference(views)


def test_few_codes_leave(cell: w.Cell) -> None:
    """Which of a few codes a run fails with is paid for by the overhead: at most 16 answers."""
    views = set()
    for code in CODES:

        def fail(_task: Task, code: str = code) -> None:
            raise errors.refuse(code, "", "")

        cell.worker.before = fail
        views.add(look(cell, w.SCORE))
    assert len(views) <= 16


def test_progress_says_nothing(cell: w.Cell) -> None:
    """The counter of finished prompts comes from the worker, may be read for nothing, and any number of times."""
    views = []
    for secret in SECRETS:
        wire = cell.wire()
        held = _held_after(cell, lambda task, secret=secret: task.progress(1000 * secret))
        started = wire.ask("POST", "/v1/runs", {"model": w.MODEL, "prompts": w.PROMPTS, **w.SCORE}).json
        held.wait()
        views.append(w.seen(wire.ask("GET", f"/v1/jobs/{started['job']}")))
        held.release()
        wire.ask("GET", f"/v1/jobs/{started['job']}/result?wait_s=30")
        cell.worker.behave()
    assert len(set(views)) == 1, views[:2]


@dataclass
class _Held:
    """A run that stands still until it is let go."""

    told: threading.Event
    gone_on: threading.Event

    def wait(self) -> None:
        assert self.told.wait(10)

    def release(self) -> None:
        self.gone_on.set()


def _held_after(cell: w.Cell, first: Callable[[Task], None]) -> _Held:
    held = _Held(threading.Event(), threading.Event())

    def before(task: Task) -> None:
        first(task)
        held.told.set()
        held.gone_on.wait(10)

    cell.worker.before = before
    return held


def test_rows_nobody_asked_for_are_not_stored(cell: w.Cell) -> None:
    """How many rows a handle has can be asked for nothing: the worker must not choose it."""
    views = []
    for secret in SECRETS:

        def before(task: Task, secret: int = secret) -> None:
            n = secret
            rows = RowTags(*(np.zeros(n, dtype=np.int64) for _ in range(3)), ("prompt",) * n)
            task.sinks["out"].append({"resid_post.1": np.zeros((n, 32), dtype=np.float32)}, rows)

        cell.worker.before = before
        views.append(look(cell, w.CAPTURE))
    assert len(set(views)) == 1, difference(views)


def test_facts_are_those_that_were_loaded(cell: w.Cell) -> None:
    """What a model is, and whether its weights are open, is not for the worker to say while it runs."""
    views = []
    for secret in SECRETS:
        cell.worker.lie = lambda f, s=secret: f.model_copy(update={"norms": {"resid_post": (float(s),)}})
        wire = cell.wire()
        wire.ask("GET", "/v1/models")
        wire.ask("GET", "/v1/capabilities")
        cell.worker.behave()
        views.append(tuple(w.seen(h) for h in wire.heard))
    assert len(set(views)) == 1


def test_the_worker_cannot_open_its_weights(cell: w.Cell) -> None:
    """Nor lift the limit by another lineage, another size, or by calling itself open."""
    wire = cell.wire()
    honest = wire.budget()["limit_bits"]
    lies: dict[str, Any] = {"open_weights": True, "lineage": "elsewhere", "weight_bits": 10**15}
    found = {}
    for name, value in lies.items():
        cell.worker.lie = lambda f, n=name, v=value: f.model_copy(update={n: v})
        answer = wire.run(w.SCORE)
        found[name] = (answer.status, wire.budget()["limit_bits"], wire.budget()["spent_bits"])
        cell.worker.behave()
    spent = wire.budget()["spent_bits"]
    assert {name: limit for name, (_, limit, _) in found.items()} == dict.fromkeys(lies, honest)
    assert spent == sum(h.charged_bits for h in wire.heard)


def test_the_name_of_an_engine_is_fixed(cell: w.Cell) -> None:
    views = []
    for secret in SECRETS:
        cell.worker.calls_itself = f"w{secret}"
        views.append(look(cell, w.SCORE))
    assert len(set(views)) == 1, difference(views)


def test_an_honest_worker_is_heard(cell: w.Cell, tmp_path: Path) -> None:
    """The comparison can fail: other prompts give another view, the same prompts the same."""
    same = {look(cell, w.SCORE) for _ in range(3)}
    other = look(cell, w.TRUTH)
    assert len(same) == 1
    assert other not in same
