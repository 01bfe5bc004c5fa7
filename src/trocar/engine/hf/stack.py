"""One forward pass over packed rows: hooks on the sites, rows that move between layers, an end as early as can be.

The model's own modules do the computing. What is added: a visitor per site that somebody asked for, an index on
the inputs of the layers where rows leave or part, and packed attention. A pass in which nobody wants the last
layers ends before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from trocar.engine.hf.attention import Context, Rows
from trocar.engine.hf.stages import Stage
from trocar.models.adapters import SiteAdapter
from trocar.models.taps import tapped
from trocar.sites import Site

Visitors = Mapping[Site, Callable[[torch.Tensor], torch.Tensor | None]]


class _Enough(Exception):
    """Not an error: no row is left that anybody wants computed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A model without its unembedding, driven one packed step at a time."""

    adapter: SiteAdapter
    context: Context

    @property
    def n_layers(self) -> int:
        return self.adapter.n_layers

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        stages: Sequence[Stage],
        rows: Sequence[Rows],
        visitors: Visitors,
    ) -> torch.Tensor | None:
        """Runs ids [N] at positions [N]; gives the last stage's rows after the last norm, None when it ended early."""
        with ExitStack() as undo:
            undo.enter_context(
                self.context.running([(s.layer, r) for s, r in zip(stages, rows, strict=True)])
            )
            for hook in self._movers(stages):
                undo.callback(hook.remove)
            undo.enter_context(tapped(self.adapter, visitors))
            last: list[torch.Tensor] = []
            undo.callback(self.adapter.final_norm.register_forward_hook(_end(last)).remove)
            with suppress(_Enough):
                self.adapter.inner(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        return last[0] if last else None

    def _movers(self, stages: Sequence[Stage]) -> list[Any]:
        if len(stages) == 1:
            return []
        hooks, layers = [], self.adapter.layers
        for number in range(stages[1].layer, len(layers)):
            stage = next(s for s in reversed(stages) if s.layer <= number)
            mover = _mover(stage, stage.layer == number, len(_origin(stages)))
            hooks.append(layers[number].register_forward_pre_hook(mover, with_kwargs=True))
        if stages[-1].layer == len(layers):
            hooks.append(self.adapter.final_norm.register_forward_pre_hook(_last(stages[-1])))
        return hooks


def _end(last: list[torch.Tensor]) -> Callable[..., None]:
    """Ends the pass after the last norm: what a model does behind it may count on the rows it began with."""

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
        last.append(output[0])
        raise _Enough

    return hook


def _origin(stages: Sequence[Stage]) -> range:
    """The rows of the first stage."""
    return range(sum(e.chunk.count for e in stages[0].entries))


def _mover(stage: Stage, begins: bool, rows: int) -> Callable[..., Any]:
    """Gives a layer the rows of its stage: its hidden states once, where the stage begins, the rest always."""

    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        if not stage.entries:
            raise _Enough
        if begins:
            args = (args[0].index_select(1, stage.index), *args[1:])
        return args, {name: _moved(value, stage.origin, rows) for name, value in kwargs.items()}

    return hook


def _moved(value: Any, origin: torch.Tensor | None, rows: int) -> Any:
    """Whatever has one entry per row of the first stage follows the rows."""
    if isinstance(value, tuple):
        return tuple(_moved(v, origin, rows) for v in value)
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[1] == rows and origin is not None:
        return value.index_select(1, origin)
    return value


def _last(stage: Stage) -> Callable[..., Any]:
    def hook(_module: Any, args: Any) -> Any:
        if not stage.entries:
            raise _Enough
        return (args[0].index_select(1, stage.index), *args[1:])

    return hook
