"""Attacks on the unembedding matrix, through log-probabilities.

A row of log-probabilities is a vector of the column space of the matrix, less one number for all tokens. So d rows
span it (Carlini et al. 2024, Finlayson et al. 2024), and a caller who also chooses what the matrix reads gets its
columns one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from trocar.attacks.extract import Ask, harvest
from trocar.attacks.loot import F64, Fact, Loot, Piece
from trocar.attacks.purse import Raid
from trocar.client import edit

PER_NODE: Final = 20
SPARE_ROWS: Final = 16
SPARE_COLUMNS: Final = 16
INJECTED: Final = 16.0
NAME: Final = "lp"
MOST_TENSORS: Final = 250


def hidden_dimension(raid: Raid) -> Loot:
    """The rank of enough log-probabilities is the width of the model."""
    n_rows, n_columns = raid.model.d_model + SPARE_ROWS, raid.model.d_model + SPARE_COLUMNS
    side = math.isqrt(raid.purse.numbers(n_rows * n_columns))
    n_rows, n_columns = min(n_rows, side), min(n_columns, side)
    whole = _centred_rows(_ordinary(raid, n_rows, raid.tokens(n_columns)))
    return Loot(facts=(Fact("d_model", float(rank(whole))),))


def _centred_rows(table: F64) -> F64:
    """The rows that came whole, each less its mean: what the softmax adds to all tokens alike."""
    whole = table[np.isfinite(table).all(axis=1)]
    centred: F64 = whole - whole.mean(axis=1, keepdims=True)
    return centred


def rank(centred: F64) -> int:
    """How many singular values stand before the largest step down; of fewer than three rows, how many rows."""
    if min(centred.shape) < 3:
        return len(centred)
    sizes = np.linalg.svd(centred, compute_uv=False)[: centred.shape[1] - 1]  # the last is 0 by the centring
    steps = np.log(np.maximum(sizes[:-1], 1e-12)) - np.log(np.maximum(sizes[1:], 1e-12))
    return int(np.argmax(steps)) + 1


def subspace(raid: Raid) -> Loot:
    """The span of the matrix's columns, which leaves an unknown d by d map of them open.

    Of twice as many tokens as the model is wide: in fewer, a span says little, and as many as the width are spanned by
    anything. With a small budget, fewer rows of fewer tokens, again half as many rows as tokens.
    """
    n_rows = raid.model.d_model + SPARE_ROWS
    tokens = raid.tokens(max(raid.effort.tokens, 2 * raid.model.d_model))
    most = raid.purse.numbers(n_rows * len(tokens))
    if n_rows * len(tokens) > most:
        tokens = tokens[: max(1, min(len(tokens), 2 * math.isqrt(most // 2)))]
        n_rows = max(1, min(n_rows, most // len(tokens)))
    whole = _centred_rows(_ordinary(raid, n_rows, tokens))
    n_dims = min(len(whole), raid.model.d_model, len(tokens))
    span = np.linalg.svd(whole, full_matrices=False)[2][:n_dims] if n_dims else np.zeros((0, len(tokens)))
    alike = np.full(
        (min(n_dims, 1), len(tokens)), len(tokens) ** -0.5
    )  # the softmax adds any number to all tokens
    basis_TR = np.concatenate([alike, span]).T
    known = np.ones(basis_TR.shape, dtype=np.bool_)
    return Loot((Piece("unembed", np.asarray(tokens, dtype=np.int64), basis_TR, known, "rotation"),))


def _ordinary(raid: Raid, n_rows: int, tokens: Sequence[int]) -> F64:
    """Log-probabilities of tokens after prompts of random tokens, without any edit."""
    text = np.random.default_rng(2).integers(0, raid.model.facts.vocab_size, n_rows).tolist()

    def ask(rows: Sequence[int], columns: Sequence[int]) -> Ask:
        with raid.model.trace([text[: rows[-1] + 1]]) as t:
            _save_logprobs(t, [tokens[c] for c in columns], f"prompt[{rows[0]}:{rows[-1] + 1}]")
        return Ask(t.recorded, _read_logprobs)

    return harvest(raid.purse, n_rows, len(tokens), raid.effort.batch_rows, ask)


def _save_logprobs(t: Any, tokens: Sequence[int], at: str) -> None:
    for start in range(0, len(tokens), PER_NODE):
        t.save(f"{NAME}.{start}", t.logprobs(list(tokens[start : start + PER_NODE]), at=at))


def _read_logprobs(results: Mapping[str, Any]) -> F64:
    starts = sorted(int(name.rpartition(".")[2]) for name in results)
    return np.concatenate([np.asarray(results[f"{NAME}.{s}"].values) for s in starts], axis=1)


def steer(raid: Raid) -> Loot:
    """A basis vector where the matrix reads: the log-probabilities are its column, centred over the tokens."""
    tokens, width = raid.tokens(raid.effort.tokens), raid.model.d_model
    batch = min(raid.effort.batch_rows, MOST_TENSORS)
    table = harvest(raid.purse, width, len(tokens), batch, partial(_steered, raid, tokens))
    columns_TD = table.T / INJECTED
    return Loot((Piece.of("unembed", tokens, _centred(columns_TD), "mean"),))


def _centred(values_TD: F64) -> F64:
    """Less the mean of what is known of each column; one number alone says nothing."""
    counts = np.isfinite(values_TD).sum(axis=0)
    means = np.nansum(values_TD, axis=0) / np.maximum(counts, 1)
    return np.where(counts > 1, values_TD - means, np.nan)


def _steered(raid: Raid, tokens: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Ask:
    with raid.model.trace([[0] * len(rows)]) as t:
        for place, direction in enumerate(rows):
            vector = np.zeros(raid.model.d_model, dtype=np.float32)
            vector[direction] = INJECTED
            t.apply(edit.set("final_norm", vector, at=f"prompt[{place}]"))
        _save_logprobs(t, [tokens[c] for c in columns], "prompt[*]")
    return Ask(t.recorded, _read_logprobs)
