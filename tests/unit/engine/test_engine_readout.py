"""One pass over the unembedding serves every asker, each with its own rows and nobody else's."""

from __future__ import annotations

import torch

from trocar.engine import readout
from trocar.engine.readout import Asks, Readout, named, top

WIDTH, VOCAB = 4, 7
HEAD = torch.randn(WIDTH, VOCAB, generator=torch.Generator().manual_seed(0))


class Counting:
    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, rows_ND: torch.Tensor) -> torch.Tensor:
        self.rows += len(rows_ND)
        return rows_ND @ HEAD


def _gather(into: dict[str, torch.Tensor], name: str, n: int):  # type: ignore[no-untyped-def]
    into[name] = torch.full((n, VOCAB), torch.nan)

    def then(rows: slice, logits: torch.Tensor) -> None:
        into[name][rows] = logits

    return then


def test_a_row_that_several_want_is_computed_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(readout, "CHUNK_ROWS", 3)
    head, found = Counting(), {}
    final = torch.randn(10, WIDTH)
    asks = Asks(Readout(lambda x: x, head), final)
    for name, index in {"a": [0, 1, 2, 9], "b": [2], "c": [5, 9]}.items():
        asks.final(torch.tensor(index), _gather(found, name, len(index)))
    asks.serve()
    assert head.rows == 5
    for name, index in {"a": [0, 1, 2, 9], "b": [2], "c": [5, 9]}.items():
        assert torch.allclose(found[name], final[index] @ HEAD)


def test_rows_of_ones_own_are_normed_unless_they_are(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(readout, "CHUNK_ROWS", 2)
    found: dict[str, torch.Tensor] = {}
    rows = {"raw": torch.randn(3, WIDTH), "other": torch.randn(2, WIDTH), "normed": torch.randn(3, WIDTH)}
    asks = Asks(Readout(lambda x: 2 * x, Counting()), None)
    for name, data in rows.items():
        asks.loose(data, name == "normed", _gather(found, name, len(data)))
    asks.final(torch.tensor([0]), _gather(found, "none", 1))
    asks.serve()
    assert torch.allclose(found["raw"], 2 * rows["raw"] @ HEAD)
    assert torch.allclose(found["other"], 2 * rows["other"] @ HEAD)
    assert torch.allclose(found["normed"], rows["normed"] @ HEAD)
    assert bool(found["none"].isnan().all()), "a pass that ended early has no final rows"


def test_top_and_named() -> None:
    logprobs = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]).log()
    ids, best = top(logprobs, 2)
    assert ids.tolist() == [[1, 2], [0, 2]]
    assert torch.allclose(torch.from_numpy(best).exp(), torch.tensor([[0.7, 0.2], [0.5, 0.3]]))
    assert named(logprobs, ids)[0].tolist() == best[0].tolist()
