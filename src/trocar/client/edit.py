"""Edits as values: `trocar.edit.add("resid_post.12", direction, coef=4.0)`.

A site may be a family, `resid_post.*`, which edits every layer. `at` is a selector; the default `all` means
every prompt token and every generated token.
"""

from __future__ import annotations

from typing import Any

from trocar.graph.builder import EditSpec, Position, selector
from trocar.graph.ops import ZERO

__all__ = ["add", "project_out", "scale", "set", "zero"]


def add(site: str, value: Any, *, coef: float = 1.0, at: Position = "all") -> EditSpec:
    """h + coef * value (Turner et al. 2023, Rimsky et al. 2023).

    Args:
        site: `resid_post.12`, or `resid_post.*`.
        value: float array [width], a fitted direction, stored rows, or an expression of the same trace.
        coef: in units of `value`.
        at: selector, index or slice.
    """
    return EditSpec("edit.add", site, selector(at), value, coef)


def set(site: str, value: Any, *, at: Position = "all") -> EditSpec:
    """The selected rows become `value`: activation patching when it is stored rows (Vig et al. 2020)."""
    return EditSpec("edit.set", site, selector(at), value)


def zero(site: str, *, at: Position = "all") -> EditSpec:
    """The selected rows become zeros."""
    return EditSpec("edit.set", site, selector(at), ZERO)


def scale(site: str, by: float, *, at: Position = "all") -> EditSpec:
    """h * by."""
    return EditSpec("edit.scale", site, selector(at), None, by)


def project_out(site: str, value: Any, *, at: Position = "all") -> EditSpec:
    """Removes the component along `value` [width] (Arditi et al. 2024)."""
    return EditSpec("edit.project_out", site, selector(at), value)
