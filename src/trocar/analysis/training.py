"""Training small networks on batches that stream by: AdamW, stopped when a held-out loss no longer falls.

Several networks learn from one pass (a probe and its control see the same batches). Random numbers come from
generators that are handed in, never from torch's own, so one thread and one seed give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trocar import errors

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how fast to train. Steps, not passes: a store may have a thousand rows or a billion.

    Attributes:
        steps: batches at most, over as many passes as that takes.
        patience: steps without a better held-out loss after which a network stops.
        every: steps between two looks at the held-out loss.
        rate, decay: learning rate and weight decay of AdamW (Loshchilov and Hutter 2019).
    """

    steps: int = 3000
    patience: int = 500
    every: int = 50
    rate: float = 3e-3
    decay: float = 1e-2


def require_pace(pace: Pace) -> None:
    """Refuses with `bad_value` what cannot train."""
    for name, value in (("steps", pace.steps), ("patience", pace.patience), ("every", pace.every)):
        if not 1 <= value <= 1_000_000:
            raise errors.refuse("bad_value", name, f"{value!r} is not between 1 and 1000000")
    if not 0 < pace.rate <= 10:
        raise errors.refuse("bad_value", "rate", f"{pace.rate!r} is not in (0, 10]")
    if not 0 <= pace.decay <= 10:
        raise errors.refuse("bad_value", "decay", f"{pace.decay!r} is not in [0, 10]")


@dataclass(frozen=True, slots=True)
class Course:
    """How the training of one network went: steps until its best state, and the held-out loss there."""

    steps: int
    loss: float


@dataclass(slots=True)
class _Runner:
    net: nn.Module
    adam: torch.optim.AdamW
    best: dict[str, Tensor]
    loss: float = np.inf
    step: int = 0

    def look(self, loss: float, step: int) -> None:
        """Keeps the state of the network if it is the best so far."""
        if loss < self.loss:
            self.best = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
            self.loss, self.step = loss, step


def descend(
    nets: Sequence[nn.Module],
    batches: Callable[[], Iterator[Batch]],
    loss: Callable[[int, Batch], Tensor],
    held: Callable[[int], float],
    pace: Pace,
) -> list[Course]:
    """Trains all networks on the same batches; each ends in the state with the lowest held-out loss.

    The state before training counts too, so none ends worse than it began.

    Args:
        batches: begins a new pass; each pass has a batch.
        loss: of network i on a batch.
        held: of network i on what is held out.

    Raises:
        RunFailed: `fit_not_converged` when a held-out loss is not finite.
    """
    runners = [
        _Runner(net, torch.optim.AdamW(net.parameters(), lr=pace.rate, weight_decay=pace.decay), {})
        for net in nets
    ]
    for i, runner in enumerate(runners):
        runner.look(_measured(held, i), 0)
    live = list(range(len(nets)))
    for step, batch in enumerate(_endless(batches), start=1):
        for i in live:
            _step(runners[i].adam, loss(i, batch))
        if step % pace.every == 0 or step == pace.steps:
            for i in live:
                runners[i].look(_measured(held, i), step)
            live = [i for i in live if step - runners[i].step < pace.patience]
        if step == pace.steps or not live:
            break
    for runner in runners:
        runner.net.load_state_dict(runner.best)
    return [Course(r.step, r.loss) for r in runners]


def _endless(batches: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    while True:
        yield from batches()


def _step(adam: torch.optim.AdamW, loss: Tensor) -> None:
    adam.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()


def _measured(held: Callable[[int], float], i: int) -> float:
    with torch.no_grad():
        found = held(i)
    if not np.isfinite(found):
        raise errors.refuse("fit_not_converged", "rate", f"the held-out loss is {found}")
    return found


def drawn(rng: np.random.Generator, n_in: int, n_out: int, gain: float = 1.0) -> nn.Parameter:
    """A weight matrix [n_in, n_out], normal with variance gain / n_in (He et al. 2015 with gain 2)."""
    weights = rng.standard_normal((n_in, n_out)) * np.sqrt(gain / n_in)
    return nn.Parameter(torch.from_numpy(weights.astype(np.float32)))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def array(value: Tensor) -> npt.NDArray[np.float32]:
    """A copy of a tensor, float32."""
    return np.array(value.detach().numpy(), dtype=np.float32)
