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
import stuffing_room as s
import worker_room as w

from trocar import errors
from trocar.codes import CODES
from trocar.engine.protocol import Captured, Generated, Lensed, Metered, RowTags, Scored, Task, TaskResult
from trocar.gate.policy import Tier

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
        paid: whether also what is charged for must stay the same: ids that are none would hold more than they cost.
    """

    name: str
    program: dict[str, Any]
    bend: Callable[[int, TaskResult], TaskResult]
    paid: bool = False


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


def narrow(secret: int, o: Lensed) -> Lensed:
    return replace(o, ids=o.ids[..., : secret % 3], logprobs=o.logprobs[..., :1])


def strange(secret: int, ids: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return ((10**6 + secret,), *ids[1:])


def extra(secret: int, result: TaskResult) -> TaskResult:
    return replace(result, outputs={**result.outputs, f"x{secret}": result.outputs["out"]})


def another_kind(secret: int, o: Scored) -> Any:
    n = len(o.scores)
    ids = np.zeros((1, n, 1), dtype=np.int64)
    kinds = (
        Metered(np.zeros(n, dtype=np.float32)),
        Captured((1, 1)),
        Generated(((1,), (1,)), (257, None)),
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
    Place("width of a lens", w.LENS, out(narrow)),
    Place("ids outside the vocabulary", w.LENS, field("ids", lambda s, ids: ids + 2**40 * s), paid=True),
    Place("negative ids", w.LENS, field("ids", lambda s, ids: -s - ids), paid=True),
    Place("number of logprobs", w.LOGPROBS, field("logprobs", lambda s, x: x[:, : s % 3])),
    Place("number of metrics", w.METRIC, field("values", lambda s, x: x[: s % 2])),
    Place("shape of a pattern", w.PATTERN, field("probs", lambda s, x: x[:, : s % 2])),
    Place("ids of a text outside the vocabulary", w.TEXT, field("ids", strange), paid=True),
    Place("number of texts", w.TEXT, out(lambda s, o: Generated(o.ids[: s % 2], o.ends[: s % 2]))),
    Place("texts longer than asked for", w.TEXT, field("ids", lambda s, ids: ((s,) * (20 + s), *ids[1:])), paid=True),
    Place("end tokens that are none", w.TEXT, field("ends", lambda s, e: (s, *e[1:]))),
    Place("number of end tokens", w.TEXT, field("ends", lambda s, e: e * (s + 1))),
    Place("lengths of texts", w.TEXT, lambda s, r: replace(r, lengths=(10 * s, -s))),
    Place("lengths nobody asked for", w.SCORE, lambda s, r: replace(r, lengths=(s, s))),
    Place("rows that an edit wrote", w.EDIT, effect(rows=lambda s, _: s * 10**12)),
    Place("rows that a capture says it has", w.CAPTURE, field("rows_per_prompt", lambda s, _: (s * 10**12, s))),
    Place("number of prompts of a capture", w.CAPTURE, field("rows_per_prompt", lambda s, r: r * s)),
    Place("kind of an output", w.SCORE, out(another_kind)),
    Place("order of outputs", w.TWO_SCORES, ordered),
    Place("outputs left out", w.TWO_SCORES, left_out),
    Place("outputs nobody asked for", w.SCORE, extra),
    Place("effects nobody asked for", w.SCORE, lambda s, r: replace(r, edits=tuple(r.edits) * s)),
)  # fmt: skip


def look(cell: w.Cell, program: dict[str, Any], *, paid: bool = False) -> View:
    """Everything that the attacker sees of one run, and of the handle that it leaves.

    Args:
        paid: whether numbers and ids, which are charged for, are looked at too.
    """
    wire = cell.wire()
    answer = wire.run(program)
    handles = wire.ask("GET", "/v1/handles").json["handles"]
    for handle in handles:
        wire.ask("GET", f"/v1/handles/{handle['handle']}")
        wire.ask("DELETE", f"/v1/handles/{handle['handle']}")
    cell.behave()
    heard = [h for h in wire.heard if h.status != 202]
    seen = tuple(w.seen(h) for h in heard if paid or h is not answer)
    return View(
        answer.status == 200, (*seen, s.fixed(answer.json) if answer.status == 200 else w.seen(answer))
    )


@dataclass(frozen=True)
class View:
    """Whether a run succeeded, and what was seen of it."""

    ok: bool
    seen: tuple[Any, ...]


def told_apart(views: list[View]) -> str:
    """What tells the secrets apart; empty when nothing does.

    Failing or not is paid for by the overhead, and so is which of two ways to fail the server names.
    """
    for ok, most in ((True, 1), (False, 2)):
        found = list(dict.fromkeys(v.seen for v in views if v.ok is ok))
        if len(found) > most:
            pairs = [(a, b) for a, b in zip(found[0], found[-1], strict=False) if a != b]
            return "\n".join(f"{a}\n{b}" for a, b in pairs[:1])[:2000] or "different numbers of answers"
    return ""


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.name)
def test_a_place_is_closed(cell: w.Cell, place: Place) -> None:
    views = []
    for secret in SECRETS:
        cell.engine.bend = lambda _task, result, secret=secret: place.bend(secret, result)
        views.append(look(cell, place.program, paid=place.paid))
    assert told_apart(views) == ""


@pytest.mark.parametrize(
    "raised",
    [
        lambda n: errors.refuse("edit_missed", f"w{n}", f"the weights are {n}"),
        lambda n: errors.refuse("result_not_finite", "", "", next_step=f"{n}"),
        lambda n: errors.full(f"{n} requests are waiting", 100.0 * n),
        lambda n: ValueError(f"w{n}"),
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
            cell.engine.before = partial(fail, secret)
        else:
            cell.engine.bend = partial(fail, secret)
        views.append(look(cell, w.SCORE))
    assert told_apart(views) == ""


def test_few_codes_leave(cell: w.Cell) -> None:
    """Which of a few codes a run fails with is paid for by the overhead: at most 20 answers."""
    views = set()
    for code in CODES:

        def fail(_task: Task, code: str = code) -> None:
            raise errors.refuse(code, "", "")

        cell.engine.before = fail
        views.add(look(cell, w.SCORE))
    assert len(views) <= 20


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
        cell.behave()
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

    cell.engine.before = before
    return held


def test_rows_nobody_asked_for_are_not_stored(cell: w.Cell) -> None:
    """How many rows a handle has can be asked for nothing: the worker must not choose it."""
    views = []
    for secret in SECRETS:

        def before(task: Task, secret: int = secret) -> None:
            n = secret
            rows = RowTags(*(np.zeros(n, dtype=np.int64) for _ in range(3)), ("prompt",) * n)
            task.sinks["out"].append({"resid_post.1": np.zeros((n, 32), dtype=np.float32)}, rows)

        cell.engine.before = before
        views.append(look(cell, w.CAPTURE))
    assert told_apart(views) == ""


def test_facts_are_those_that_were_loaded(cell: w.Cell) -> None:
    """What a model is, and whether its weights are open, is not for the worker to say while it runs."""
    views = []
    for secret in SECRETS:
        cell.engine.lie = lambda f, s=secret: f.model_copy(update={"norms": {"resid_post": (float(s),)}})
        wire = cell.wire()
        wire.ask("GET", "/v1/models")
        wire.ask("GET", "/v1/capabilities")
        cell.behave()
        views.append(tuple(w.seen(h) for h in wire.heard))
    assert len(set(views)) == 1


LIES: dict[str, dict[str, Any]] = {
    "open": {"open_weights": True},
    "another lineage": {"lineage": "elsewhere"},
    "another lineage, open": {"lineage": "elsewhere-open", "open_weights": True},
    "a larger secret": {"weight_bits": 10**15},
    "a small vocabulary": {"vocab_size": 2},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("tier", [Tier.external, Tier.open])
def test_the_worker_cannot_lift_its_limit(cell: w.Cell, lie: str, tier: Tier) -> None:
    """Whatever it says of itself while it runs, what leaves is charged to the secret that was loaded."""
    wire = cell.wire(tier=tier)
    honest = wire.budget()
    cell.engine.lie = lambda f: f.model_copy(update=LIES[lie])
    answer = wire.run(w.LENS)
    told = wire.budget()
    cell.behave()
    assert told["limit_bits"] == honest["limit_bits"]
    assert wire.budget()["spent_bits"] - honest["spent_bits"] == answer.charged_bits
    assert answer.status == (200 if tier is Tier.external else 403)
    if answer.status == 200:
        assert answer.charged_bits == wire.run(w.LENS).charged_bits


def test_the_name_of_an_engine_is_fixed(cell: w.Cell) -> None:
    views = []
    for secret in SECRETS:
        cell.engine.calls_itself = f"w{secret}"
        views.append(look(cell, w.SCORE))
    assert told_apart(views) == ""


def test_an_honest_worker_is_heard(cell: w.Cell, tmp_path: Path) -> None:
    """The comparison can fail: other prompts give another view, the same prompts the same."""
    same = {look(cell, w.SCORE, paid=True) for _ in range(3)}
    other = look(cell, w.TRUTH, paid=True)
    assert len(same) == 1
    assert other not in same
