"""Sweeps in the SDK: writing axes down, and their variants as a grid of results.

t.sweep(trocar.edit.add("resid_post.12", v), coef=[0, 4, 8], layer=range(8, 16))
results.sweep.grid("lp")          array [coef, layer, ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args, overload

import numpy as np
import numpy.typing as npt

from trocar import errors, strict
from trocar.client.notebook import html_table, text_table
from trocar.graph import sweep
from trocar.graph.builder import Recorder, SiteProxy, selector
from trocar.wire import results as r

SHOWN: Final = 40
FIELDS: Final = get_args(sweep.AxisField)
Setting = int | float | str


# ---- writing axes down ----------------------------------------------------------------------------


def axes(recorder: Recorder, node: str, values: Mapping[str, Sequence[Any]]) -> tuple[sweep.Axis, ...]:
    """One axis per keyword; layers may count from the end, positions may be indices or slices.

    Raises:
        ClientError: `bad_argument` for a keyword that is no field, or without values.
    """
    out = []
    for name, given in values.items():
        if name not in FIELDS:
            near = errors.closest(name, FIELDS)
            reason = f"a sweep has no {name!r}; it has {', '.join(FIELDS)}"
            raise errors.refuse("bad_argument", name, reason, closest=near)
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise errors.refuse("bad_argument", name, f"{given!r} is not a list of values")
        plain = tuple(_plain(recorder, name, value) for value in given)
        out.append(strict.make(sweep.Axis, node=node, field=name, values=plain))
    if not out:
        raise errors.refuse("bad_argument", "sweep", "no values to sweep over: name a field, coef=[1, 2]")
    return tuple(out)


def _plain(recorder: Recorder, name: str, value: Any) -> Any:
    if name == "at":
        return selector(value)
    if name == "layer":
        return SiteProxy(recorder, "resid_post").place(value).layer
    return value.item() if hasattr(value, "item") else value


# ---- what came back -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant(Mapping[str, Any]):
    """The outputs of one variant by name.

    Attributes:
        settings: values by `node.field`.
        edits: what its edits really did.
    """

    settings: Mapping[str, Setting]
    outputs: Mapping[str, Any]
    edits: tuple[r.EditReceipt, ...]

    def __getitem__(self, name: str) -> Any:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True, slots=True, repr=False)
class Sweep(Sequence[Variant]):
    """The variants of a sweep, the last axis changing fastest."""

    variants: tuple[Variant, ...]

    @property
    def axes(self) -> dict[str, tuple[Setting, ...]]:
        """Values by axis. An axis is called by its field, or by `node.field` where two have the same field."""
        if not self.variants:
            return {}
        labels = list(self.variants[0].settings)
        fields = [label.rpartition(".")[2] for label in labels]
        names = [f if fields.count(f) == 1 else label for f, label in zip(fields, labels, strict=True)]
        return {
            name: tuple(dict.fromkeys(v.settings[label] for v in self.variants))
            for name, label in zip(names, labels, strict=True)
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each axis has."""
        return tuple(len(values) for values in self.axes.values())

    def at(self, **settings: Any) -> Variant:
        """The variant with these values, one for each axis: `sweep.at(coef=4.0, layer=12)`.

        Raises:
            ClientError: `bad_argument` for a name that is no axis, or a value that it does not have.
        """
        axes = self.axes
        odd = next((n for n in (*settings, *axes) if n not in axes or n not in settings), None)
        if odd is not None:
            reason = f"name one value of each axis: {', '.join(axes) or 'there is none'}"
            raise errors.refuse("bad_argument", odd, reason, closest=errors.closest(odd, axes))
        place = 0
        for name, values in axes.items():
            if settings[name] not in values:
                raise errors.refuse("bad_argument", name, f"{settings[name]!r} is not one of {list(values)}")
            place = place * len(values) + values.index(settings[name])
        return self.variants[place]

    def grid(self, name: str) -> npt.NDArray[Any]:
        """One output of every variant, as an array [axis, axis, ..., shape of the output].

        Raises:
            ClientError: `bad_argument` for an output without numbers, or of another shape in each variant.
        """
        found = [v[name] for v in self.variants]
        if not found or not hasattr(found[0], "to_numpy"):
            raise errors.refuse("bad_argument", name, f"{name!r} is no output with numbers")
        arrays = [one.to_numpy() for one in found]
        if len({a.shape for a in arrays}) > 1:
            raise errors.refuse(
                "bad_argument",
                name,
                f"{name!r} has another shape in each variant: {[a.shape for a in arrays]}"[:300],
            )
        return np.stack(arrays).reshape(*self.shape, *arrays[0].shape)

    @overload
    def __getitem__(self, index: int) -> Variant: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Variant]: ...
    def __getitem__(self, index: int | slice) -> Variant | Sequence[Variant]:
        return self.variants[index]

    def __len__(self) -> int:
        return len(self.variants)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        names = list(self.variants[0]) if self.variants else []
        rows = [
            [*(str(x) for x in v.settings.values()), *(_summary(v[name]) for name in names)]
            for v in self.variants[:SHOWN]
        ]
        return [*self.axes, *names], rows

    def __repr__(self) -> str:
        if not self.variants:
            return "Sweep without variants"
        return text_table(f"Sweep of {len(self)} variants (outputs: their mean)", *self._table())

    def _repr_html_(self) -> str:
        return html_table(f"Sweep of {len(self)} variants (outputs: their mean)", *self._table())


def _summary(output: Any) -> str:
    """The mean of an output's numbers, or a short text."""
    if hasattr(output, "to_numpy"):
        return f"{float(np.mean(output.to_numpy())):.4g}"
    return repr(str(output[0]))[:30] if isinstance(output, list) and output else type(output).__name__
