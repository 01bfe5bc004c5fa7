"""What a whole compromised worker may hand to the gate: exactly the declared arrays, or nothing leaves.

Here the worker bends what it gives after everything that runs beside it was honest. Whatever is not declared is
refused in the same words for every secret; what is declared is charged for, and counted in `test_attack_worker`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import worker_room as w
from test_attack_channels import SECRETS, look, told_apart

from trocar import errors
from trocar.gate.policy import Tier
from trocar.service.worker import RunOrder, Watch

Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory, tiny_of: Callable[..., Any]) -> Iterator[w.Cell]:
    loaded = tiny_of(w.MODEL, open_weights=False, weight_bits=4_000_000_000)
    with w.cell(loaded, tmp_path_factory.mktemp("cell")) as made:
        yield made


@dataclass(frozen=True)
class Bend:
    """One way to say more than was declared.

    Attributes:
        bend: `(secret, arrays of a variant) -> arrays`.
        ok: whether the answer leaves all the same, without a trace of the secret.
        paid: whether also what is charged for must stay the same.
    """

    name: str
    program: dict[str, Any]
    bend: Callable[[int, Arrays], Any]
    ok: bool = False
    paid: bool = True


def with_(name: str, change: Callable[[int, Any], Any]) -> Callable[[int, Arrays], Arrays]:
    return lambda secret, arrays: {**arrays, name: change(secret, arrays[name])}


def cut(secret: int, arrays: Arrays) -> Arrays:
    return {n: a[: len(a) - secret] for n, a in arrays.items()}


def behind(secret: int, arrays: Arrays) -> Arrays:
    """Every text ends at once; what lies behind its only row is not asked for."""
    scores = arrays["out.scores"].copy()
    scores[:2], scores[2:] = 1.0, secret
    return {**arrays, "out.scores": scores, "lengths": np.array([1, 1], dtype=np.int32)}


def small(secret: int, scores: Any) -> Any:
    return np.full_like(scores, secret * 1e-3)


BENDS = (
    Bend("an array nobody declared", w.SCORE, lambda s, a: {**a, f"x{s}": a["out.scores"]}),
    Bend("an array under another name", w.SCORE, lambda s, a: {f"out.scores{s}": a["out.scores"]}),
    Bend("no array", w.SCORE, lambda _s, _a: {}),
    Bend("fewer rows", w.SCORE, cut),
    Bend("more rows", w.SCORE, with_("out.scores", lambda s, x: np.concatenate([x, x[:s]]))),
    Bend("another shape", w.SCORE, with_("out.scores", lambda s, x: x.reshape(2**(s % 4), -1))),
    Bend("doubles", w.SCORE, with_("out.scores", lambda s, x: x.astype(np.float64) + s * 1e-12)),
    Bend("big-endian numbers", w.SCORE, with_("out.scores", lambda s, x: (x * s).astype(">f4"))),
    Bend("objects", w.SCORE, with_("out.scores", lambda s, x: np.array([f"w{s}"] * len(x), dtype=object))),
    Bend("lists", w.SCORE, with_("out.scores", lambda s, x: [*x.tolist()[:-1], s])),
    Bend("not a number", w.SCORE, with_("out.scores", lambda s, x: _payload(x, 0x7FC00000 + s))),
    Bend("infinities", w.SCORE, with_("out.scores", lambda s, x: x * np.float32(np.inf if s % 2 else -np.inf))),
    Bend("ids outside the vocabulary", w.LENS, with_("out.ids", lambda s, x: x + 1000 * s)),
    Bend("negative ids", w.LENS, with_("out.ids", lambda s, x: x - 1000 * s)),
    Bend("long ids", w.LENS, with_("out.ids", lambda s, x: x.astype(np.int64) + (s << 40))),
    Bend("texts that end too early", w.TEXT, with_("lengths", lambda s, x: x * 0 + s)),
    Bend("lengths that cannot be", w.TEXT, with_("lengths", lambda s, x: x * 0 + 10 * s)),
    Bend("lengths nobody asked for", w.SCORE, lambda s, a: {**a, "lengths": np.array([s, s], dtype=np.int32)}),
    Bend("rows behind the last", w.GENERATED, behind, ok=True),
    Bend("rows that an edit wrote", w.EDIT, with_("receipts.rows", lambda s, x: x * 0 + 1000 * s), ok=True),
    Bend("the sign of zero and small change", w.TRUTH, with_("out.scores", small), ok=True),
    Bend("nothing at all", w.SCORE, lambda _s, _a: None),
    Bend("a word", w.SCORE, lambda s, _a: f"w{s}"),
)  # fmt: skip


def _payload(x: Any, pattern: int) -> Any:
    """Numbers with bits of their own in what is no number."""
    return np.full(x.shape, pattern, dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize("bend", BENDS, ids=lambda b: b.name)
def test_only_what_is_declared_leaves(cell: w.Cell, bend: Bend) -> None:
    views = []
    for secret in SECRETS:
        cell.worker.bend = lambda _order, variants, secret=secret: [bend.bend(secret, a) for a in variants]
        views.append(look(cell, bend.program, paid=bend.paid))
    assert told_apart(views) == ""
    assert {v.ok for v in views} == {bend.ok}


@pytest.mark.parametrize(
    "bend",
    [lambda n, v: v * (n + 1), lambda _n, _v: [], lambda n, v: {f"x{n}": v}, lambda n, _v: n],
    ids=["too many variants", "no variant", "a mapping", "a number"],
)
def test_the_number_of_variants_is_fixed(cell: w.Cell, bend: Callable[[int, list[Any]], Any]) -> None:
    views = []
    for secret in SECRETS:
        cell.worker.bend = lambda _order, variants, secret=secret: bend(secret, variants)
        views.append(look(cell, w.SCORE))
    assert told_apart(views) == ""
    assert not any(v.ok for v in views)


def test_errors_of_a_worker_say_nothing(cell: w.Cell) -> None:
    """Not in the words, not in the path, not in the seconds to wait."""
    views = []
    for secret in SECRETS:

        def fail(_order: RunOrder, _watch: Watch, secret: int = secret) -> None:
            raised = errors.full(f"w{secret}", 10.0 * secret)
            raised.refusals = (
                errors.refusal("queue_full", f"w{secret}", f"w{secret}", next_step=f"w{secret}"),
            )
            raise raised

        cell.worker.before = fail
        views.append(look(cell, w.SCORE))
    assert told_apart(views) == ""


@pytest.mark.parametrize("tier", [Tier.trusted, Tier.external, Tier.agent])
def test_progress_of_a_metered_key_says_nothing(cell: w.Cell, tier: Tier) -> None:
    """A counter that the worker sets may be read for nothing, as often as one likes."""
    counters = set()
    for secret in SECRETS:

        def tell(_order: RunOrder, watch: Watch, secret: int = secret) -> None:
            for step in range(3):
                watch.progress(1000 * secret + step)
                time.sleep(w.LOOK_S)

        cell.worker.before = tell
        wire = cell.wire(tier=tier)
        wire.run(w.SCORE)
        cell.behave()
        counters |= {h.json["done"] for h in (*wire.peeks, wire.heard[-1])}
    assert counters <= {0, len(w.PROMPTS)}


def test_a_metered_answer_comes_on_a_tick(cell: w.Cell) -> None:
    """How long a worker stalls shows as one of few whole ticks, which the overhead pays for."""
    ticks = set()
    for secret in SECRETS:

        def stall(_order: RunOrder, _watch: Watch, secret: int = secret) -> None:
            time.sleep(0.017 * secret)

        cell.worker.before = stall
        wire = cell.wire()
        wire.run(w.SCORE)
        cell.behave()
        ticks.add(wire.heard[-1].json["elapsed_s"])
    tick_s = cell.service.gate.policy.terms(Tier.external).tick_ms / 1000
    assert all(abs(t / tick_s - round(t / tick_s)) < 1e-6 for t in ticks)


METRICS: dict[str, Callable[[int, Arrays], Any]] = {
    "an array nobody declared": lambda n, a: {**a, f"x{n}": a["metrics"]},
    "another shape": lambda n, a: {"metrics": a["metrics"][:, : n % 3]},
    "doubles": lambda n, a: {"metrics": a["metrics"].astype(np.float64) + n * 1e-12},
    "nothing": lambda _n, _a: {},
}


@pytest.mark.parametrize("way", METRICS)
def test_only_the_declared_numbers_of_a_fit_leave(cell: w.Cell, way: str) -> None:
    wire = cell.wire()
    prompts = [[i, 2 * i + 1, 7] for i in range(1, 41)]
    handle = wire.run({**w.CAPTURE, "prompts": prompts}).json["outputs"]["out"]["handle"]
    labels = [i % 2 == 0 for i in range(40)]
    views = set()
    for secret in SECRETS:
        cell.worker.bend_fit = lambda arrays, secret=secret: METRICS[way](secret, arrays)
        answer = wire.finish(
            wire.ask("POST", "/v1/fits", {"handle": handle, "kind": "mean_diff", "labels": labels})
        )
        cell.behave()
        views.add(w.seen(answer))
    assert len(views) == 1
    assert {status for status, _, _ in views} == {500}
