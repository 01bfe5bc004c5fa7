"""Attacks on the embedding matrix: read it, average it, share the work between keys, ask in yes and no.

The first row of the stream is a row of the matrix, so every number that leaves about it is a number of the
weights. Nothing here is subtle; that is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from trocar.attacks.extract import DOORS, Ask, Extractor, OneHot, harvest
from trocar.attacks.loot import F64, Loot, Piece
from trocar.attacks.purse import Purse, Raid
from trocar.client import edit
from trocar.graph.builder import Expr

AVERAGED: Final = 8
SPARE_PROMPTS: Final = 16
SCALES: Final = tuple(2.0**-k for k in range(-1, 11))
SCALE_DIRECTIONS: Final = 16
UPPER: Final = 0.1587  # of a Gaussian lies above one standard deviation
SPREAD: Final = 4.0
FOLDED_MEAN: Final = 0.798  # mean of |x| in standard deviations
NAME: Final = "e"


def embedding_read(raid: Raid) -> Loot:
    """Row t of the matrix is the stream at a token t: one number per weight."""
    tokens = raid.tokens(raid.effort.tokens)
    values = _read(raid, raid.purse, tokens, range(raid.model.d_model), DOORS)
    return Loot((Piece.of("embed", tokens, values),))


def _read(
    raid: Raid, purse: Purse, tokens: Sequence[int], mine: Sequence[int], doors: Sequence[Extractor]
) -> F64:
    """Some columns of the rows of some tokens, [tokens, mine]."""

    def ask(door: Extractor, rows: Sequence[int], columns: Sequence[int]) -> Ask:
        wanted = [mine[c] for c in columns]
        with purse.model.trace([[tokens[i] for i in rows]]) as t:
            door.save(t, t.embeddings["prompt[*]"], raid.model.d_model, wanted, NAME)
        return Ask(t.recorded, partial(door.read, columns=wanted, name=NAME))

    asks = [partial(ask, door) for door in doors]
    return harvest(purse, len(tokens), len(mine), raid.effort.batch_rows, *asks)


def coalition(raid: Raid) -> Loot:
    """Several keys read different columns: more identities, the same secret."""
    tokens, width = raid.tokens(raid.effort.tokens), raid.model.d_model
    values = np.full((len(tokens), width), np.nan)
    for i, purse in enumerate(raid.purses):
        mine = range(width)[i :: len(raid.purses)]
        values[:, list(mine)] = _read(raid, purse, tokens, mine, (OneHot(),))
    return Loot((Piece.of("embed", tokens, values),))


def k_average(raid: Raid) -> Loot:
    """Only means over several tokens are asked for; with a known design they are as good as the rows."""
    tokens, width = raid.tokens(raid.effort.tokens), raid.model.d_model
    rng = np.random.default_rng(1)
    design = np.stack(
        [rng.choice(len(tokens), AVERAGED, replace=False) for _ in range(len(tokens) + SPARE_PROMPTS)]
    )

    def ask(rows: Sequence[int], columns: Sequence[int]) -> Ask:
        with raid.model.trace([[tokens[i] for i in design[r]] for r in rows]) as t:
            OneHot().save(t, t.embeddings["prompt[*]"].mean(), width, columns, NAME)
        return Ask(t.recorded, partial(OneHot().read, columns=columns, name=NAME))

    means = harvest(raid.purse, len(design), width, raid.effort.batch_rows, ask)
    weights = np.zeros((len(design), len(tokens)))
    for row, members in enumerate(design):
        weights[row, members] = 1.0 / AVERAGED
    known = np.broadcast_to(np.isfinite(means).sum(axis=0) >= len(tokens), (len(tokens), width))
    return Loot((Piece.guessed("embed", tokens, _solved(weights, means), known),))


def _solved(weights: F64, means: F64) -> F64:
    """Least squares of least norm, from the rows that came; columns with the same rows together."""
    found = np.zeros((weights.shape[1], means.shape[1]))
    patterns, which = np.unique(np.isfinite(means), axis=1, return_inverse=True)
    for i, rows in enumerate(patterns.T):
        columns = np.flatnonzero(which == i)
        if rows.any():
            found[:, columns] = np.linalg.lstsq(weights[rows], means[np.ix_(rows, columns)], rcond=None)[0]
    return found


# ---- yes and no -----------------------------------------------------------------------------------


def boolean_oracle(raid: Raid) -> Loot:
    """Truth values alone: each halves an interval. A weight costs as many bits as it has."""
    tokens, width = raid.tokens(raid.effort.oracle_tokens), raid.model.d_model
    scale = _scale(raid, tokens[0])
    low, high = np.full((len(tokens), width), -SPREAD * scale), np.full((len(tokens), width), SPREAD * scale)
    answers = np.zeros(low.shape, dtype=np.int64)
    for number in range(raid.effort.oracle_rounds):
        middle = (low + high) / 2
        ask = partial(_signs, raid, tokens, middle if number else None)
        above = harvest(raid.purse, len(tokens), width, raid.effort.batch_rows, ask)
        low, high = np.where(above > 0, middle, low), np.where(above == 0, middle, high)
        answers += np.isfinite(above)
        if not np.isfinite(above).all():
            break
    return Loot((Piece.guessed("embed", tokens, _middles(low, high, answers, scale), answers > 0),))


def _middles(low: F64, high: F64, answers: Any, scale: float) -> F64:
    """The best guess in each interval; the mean of half a Gaussian where only the sign is known."""
    folded = np.sign(low + high) * FOLDED_MEAN * scale
    return np.where(answers > 1, (low + high) / 2, folded * (answers > 0))


def _signs(raid: Raid, tokens: Sequence[int], offsets: F64 | None, rows: Sequence[int], columns: Any) -> Ask:
    """Whether each number is above its offset; offsets are subtracted from the rows on the server."""
    width = raid.model.d_model
    with raid.model.trace([[tokens[i] for i in rows]]) as t:
        for place, row in enumerate(rows if offsets is not None else ()):
            down = -np.asarray(offsets)[row].astype(np.float32)
            t.apply(edit.add("embeddings", down, at=f"prompt[{place}]"))
        numbers = OneHot().numbers(t, t.embeddings["prompt[*]"], width, columns)
        _save_truths(t, numbers, columns, lambda x: x > 0.0)
    return Ask(t.recorded, partial(OneHot().read, columns=columns, name=NAME))


def _save_truths(t: Any, numbers: Sequence[Expr], columns: Sequence[int], test: Callable[[Any], Any]) -> None:
    for column, number in zip(columns, numbers, strict=True):
        t.save(f"{NAME}.{column}", t.score(test(number)))


def _scale(raid: Raid, token: int) -> float:
    """The standard deviation, to a factor of two: which power of two a sixth of one row lies above.

    Where that may not be asked it is guessed: rows of norm one are usual.
    """
    columns = range(min(SCALE_DIRECTIONS, raid.model.d_model))
    with raid.model.trace([[token]]) as t:
        numbers = OneHot().numbers(t, t.embeddings["prompt[*]"], raid.model.d_model, list(columns))
        for i, bound in enumerate(SCALES):
            for column, number in zip(columns, numbers, strict=True):
                t.save(f"{NAME}{i}.{column}", t.score(number > bound))
    results = raid.purse.run(t.recorded)
    return float(raid.model.d_model**-0.5) if results is None else _level(results, len(columns))


def _level(results: Mapping[str, Any], count: int) -> float:
    shares = [
        np.mean([results[f"{NAME}{i}.{column}"].values[0] for column in range(count)])
        for i in range(len(SCALES))
    ]
    return SCALES[int(np.argmin(np.abs(np.asarray(shares) - UPPER)))]
