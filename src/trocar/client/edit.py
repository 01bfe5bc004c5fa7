"""Edits as values: `trocar.edit.add("resid_post.12", direction, coef=4.0)`.

A site may be a family, `resid_post.*`, which edits every layer. `at` is a selector; the default `all` means
every prompt token and every generated token. Every edit but `knockout` takes

    gate      an expression of the same trace: a mask, or numbers that blend between the old row (0) and the new (1)
    heads     one index or several: only those heads of q, k, v or z
    neurons   one index or several: only those columns of mlp_act
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack

from trocar import errors, strict
from trocar.graph import words
from trocar.graph.builder import EditOp, EditSpec, Position, indices, selector
from trocar.graph.ops import ZERO

__all__ = ["add", "affine", "clamp", "knockout", "project_out", "sae", "scale", "set", "zero"]

Unit = Literal["absolute", "site_norm"]


class Where(TypedDict, total=False):
    """Which rows, which columns, and how much."""

    at: Position
    gate: Any
    heads: Any
    neurons: Any


def _edit(
    op: EditOp,
    site: str,
    where: Where,
    *,
    value: Any = None,
    number: float = 1.0,
    operands: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> EditSpec:
    odd = next((k for k in where if k not in Where.__annotations__), None)
    if odd is not None:
        raise errors.refuse(
            "bad_argument", odd, f"{op} takes no argument {odd!r}", closest=errors.closest(odd, Where.__annotations__)
        )  # fmt: skip
    return EditSpec(
        op,
        site,
        selector(where.get("at", "all")),
        value,
        number,
        gate=where.get("gate"),
        heads=indices(where.get("heads"), "heads"),
        neurons=indices(where.get("neurons"), "neurons"),
        operands=operands or {},
        fields=fields or {},
    )


def add(
    site: str, value: Any, *, coef: float = 1.0, unit: Unit = "absolute", **where: Unpack[Where]
) -> EditSpec:
    """h + coef * value (Turner et al. 2023, Rimsky et al. 2023).

    Args:
        site: `resid_post.12`, or `resid_post.*`.
        value: float array [width], a fitted direction, stored rows, or an expression of the same trace.
        coef: in units of `value`, or with unit="site_norm" in mean norms of the site's rows.
        at: selector, index or slice.
    """
    return _edit("edit.add", site, where, value=value, number=coef, fields=_said(unit=unit))


def set(site: str, value: Any, **where: Unpack[Where]) -> EditSpec:
    """The selected rows become `value`: activation patching when it is stored rows (Vig et al. 2020)."""
    return _edit("edit.set", site, where, value=value)


def zero(site: str, **where: Unpack[Where]) -> EditSpec:
    """The selected rows become zeros."""
    return _edit("edit.set", site, where, value=ZERO)


def scale(site: str, by: float, **where: Unpack[Where]) -> EditSpec:
    """h * by."""
    return _edit("edit.scale", site, where, number=by)


def project_out(site: str, value: Any, **where: Unpack[Where]) -> EditSpec:
    """Removes the component along `value` [width] (Arditi et al. 2024)."""
    return _edit("edit.project_out", site, where, value=value)


def affine(
    site: str, down: Any, up: Any, *, inner: Any = None, bias: Any = None, **where: Unpack[Where]
) -> EditSpec:
    """h + (h D + inner) U + bias, of low rank (LoReFT, Wu et al. 2024).

    Args:
        down: D, float array [width, r], r at most 64.
        up: U, float array [r, width].
        inner: float array [r].
        bias: float array [width].
    """
    operands = {"down": down, "up": up, "inner": inner, "bias": bias}
    return _edit("edit.affine", site, where, operands=operands)


def clamp(
    site: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: Unit = "absolute",
    **where: Unpack[Where],
) -> EditSpec:
    """Keeps the component along `value` (made a unit vector) within [low, high]."""
    fields = _said(unit=unit, low=low, high=high)
    return _edit("edit.clamp", site, where, value=value, fields=fields)


def sae(
    site: str,
    dictionary: Any,
    *,
    set: Mapping[int, float] | None = None,  # noqa: A002 - the field's word
    scale: Mapping[int, float] | None = None,
    keep_error: bool = True,
    **where: Unpack[Where],
) -> EditSpec:
    """Sets or scales features of a dictionary; what it does not reconstruct is kept with `keep_error`.

    Args:
        dictionary: a `trocar.Sae`, or `t.sae(...)` of the same trace.
        set: new activation by feature.
        scale: factor by feature.
    """
    features = [strict.make(words.Feature, index=int(i), set=float(x)) for i, x in (set or {}).items()]
    features += [strict.make(words.Feature, index=int(i), scale=float(x)) for i, x in (scale or {}).items()]
    fields = {"features": tuple(features), "keep_error": keep_error}
    return _edit("edit.sae", site, where, operands={"sae": dictionary}, fields=fields)


def knockout(site: str, *, keys: Position, at: Position = "prompt[-1]", heads: Any = None) -> EditSpec:
    """Cuts attention edges (Geva et al. 2023): at `attn_probs.L`, the queries `at` give nothing to the `keys`."""
    where: Where = {"at": at, "heads": heads}
    return _edit("edit.knockout", site, where, fields={"keys": selector(keys)})


def _said(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if v is not None}
