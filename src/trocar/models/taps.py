"""Reading and editing the live tensors of a forward pass, and nothing when nobody asked.

`tapped` registers one hook per visited site and removes every hook on the way out, whatever happened. With
no visitors it registers nothing, so the model is the plain model bit for bit. The hooks sit on the shared
module: one forward pass at a time. This module knows nothing about programs or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from trocar.models.adapters import SiteAdapter, Tap, tensor_of
from trocar.sites import Site

Visitor = Callable[[torch.Tensor], torch.Tensor | None]


@contextmanager
def tapped(adapter: SiteAdapter, visitors: Mapping[Site, Visitor]) -> Iterator[None]:
    """Lets each visitor see, and replace, the tensor at its site during forward passes inside the block.

    A visitor gets the live tensor `[batch, seq, width]` (for a part of a merged projection, a view of its own
    columns) and returns None to leave it alone, or a tensor of the same shape and dtype to put in its place.
    Without gradients it must copy what it wants to keep from an in-place site, because a later write changes
    the tensor.

    Raises:
        ProgramError: `site_unavailable` or `layer_out_of_range`, before any hook is registered.
    """
    taps = [(adapter.tap(site), visitor) for site, visitor in visitors.items()]
    with ExitStack() as hooks:
        for tap, visitor in taps:
            hooks.callback(_hook(tap, visitor).remove)
        yield


def _hook(tap: Tap, visitor: Visitor) -> RemovableHandle:
    visit = partial(_visit, tap, visitor)
    if tap.side == "input":
        return tap.module.register_forward_pre_hook(_before(visit))
    return tap.module.register_forward_hook(_after(visit))


def _before(visit: Visitor) -> Callable[[Any, Any], Any]:
    def hook(_module: Any, args: Any) -> Any:
        new = visit(args[0])
        return None if new is None else (new, *args[1:])

    return hook


def _after(visit: Visitor) -> Callable[[Any, Any, Any], Any]:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        new = visit(tensor_of(output))
        if new is None or not isinstance(output, tuple):
            return new
        return (new, *output[1:])

    return hook


def _visit(tap: Tap, visitor: Visitor, whole: torch.Tensor) -> torch.Tensor | None:
    """Calls the visitor; returns what must replace the tensor, None when nothing must (or it is written)."""
    live = tap.columns(whole)
    if tap.inplace and live.requires_grad:
        _visit_inplace_with_grad(visitor, live)
        return None
    new = visitor(live)
    if new is None:
        return None
    assert new.shape == live.shape, f"a visitor turned {tuple(live.shape)} into {tuple(new.shape)}"
    assert new.dtype == live.dtype, f"a visitor turned {live.dtype} into {new.dtype}"
    if tap.inplace:
        live.copy_(new)
        return None
    return new if tap.part is None else _merged(tap, whole, new)


def _merged(tap: Tap, whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A copy of the whole with the site's columns replaced: the other columns belong to other sites."""
    copied = whole.clone()
    tap.columns(copied).copy_(new)
    return copied


def _visit_inplace_with_grad(visitor: Visitor, live: torch.Tensor) -> None:
    """Writes through a clone: autograd refuses a tensor that was overwritten after it was used."""
    seen = live.clone()
    new = visitor(seen)
    live.copy_(seen if new is None else new)
