"""Sites of a recording: `t.resid_post[12][-1]` reads, assigning to it edits.

t.z[5].heads(3, 4)[-1] *= 0          two heads of the last prompt token
t.mlp_act[7].neurons(811)["all"]     one neuron of every token
t.attn_probs[5].read(at=-1, keys="prompt[*]", heads=[0, 3])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, SupportsIndex

from trocar import errors, sites
from trocar.graph import ops
from trocar.graph.builder_expr import EditSpec, Expr, Position, indices, selector, whole

if TYPE_CHECKING:
    from trocar.graph.builder import Recorder

PATTERN: Final = "attn_probs"


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows are: a site, some of its columns, and which tokens."""

    site: sites.Site
    at: str = "all"
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None

    def moved(self, at: str) -> Place:
        return Place(self.site, at, self.heads, self.neurons)

    def edit(self, op: Any, value: Any, number: float = 1.0) -> EditSpec:
        return EditSpec(op, str(self.site), self.at, value, number, heads=self.heads, neurons=self.neurons)


class SiteRows(Expr):
    """Rows of one site: `t.resid_post[12]`, and `[...]` on it selects positions."""

    def __init__(self, recorder: Recorder, place: Place) -> None:
        self.site: Final = str(place.site)
        self.at: Final = place.at
        self.place: Final = place
        fields = {k: v for k, v in (("heads", place.heads), ("neurons", place.neurons)) if v is not None}
        super().__init__(recorder, recorder.emit(ops.Read, site=self.site, at=self.at, **fields).id)

    def heads(self, *heads: SupportsIndex) -> SiteRows:
        """Those heads alone, for reading and for editing."""
        place = Place(self.place.site, self.at, indices(heads, "heads"), self.place.neurons)
        return SiteRows(self._recorder, place)

    def neurons(self, *neurons: SupportsIndex) -> SiteRows:
        """Those neurons alone, for reading and for editing."""
        place = Place(self.place.site, self.at, self.place.heads, indices(neurons, "neurons"))
        return SiteRows(self._recorder, place)

    def __getitem__(self, position: Position) -> SiteRows:
        return SiteRows(self._recorder, self.place.moved(selector(position)))

    def __setitem__(self, position: Position, value: Any) -> None:
        self._recorder.assign(self.place.moved(selector(position)), value)

    def __iadd__(self, value: Any) -> SiteRows:
        return self._edited(self.place.edit("edit.add", value))

    def __isub__(self, value: Any) -> SiteRows:
        return self._edited(self.place.edit("edit.add", value, -1.0))

    def __imul__(self, by: Any) -> SiteRows:
        return self._edited(self.place.edit("edit.scale", None, by))

    def _edited(self, edit: EditSpec) -> SiteRows:
        """The rows after the edit: after `h += v` the name h means those."""
        self._recorder.apply(edit)
        rows = SiteRows(self._recorder, self.place)
        self._recorder.expect(rows)
        return rows


class SiteFamily:
    """The same site at several layers: `t.resid_post[:]`; `[...]` selects positions in each."""

    def __init__(self, recorder: Recorder, places: Sequence[sites.Site]) -> None:
        self._recorder = recorder
        self._places = tuple(places)
        self.members: Final = tuple(SiteRows(recorder, Place(place)) for place in self._places)

    def __getitem__(self, position: Position) -> Sequence[SiteRows]:
        at = selector(position)
        return tuple(SiteRows(self._recorder, Place(place, at)) for place in self._places)

    def __iter__(self) -> Iterator[SiteRows]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


class Patterns:
    """Attention of one layer: `t.attn_probs[5]`; `[...]` on it selects queries, with every prompt token as a key."""

    def __init__(self, recorder: Recorder, site: sites.Site) -> None:
        self._recorder = recorder
        self.site: Final = str(site)

    def read(self, *, at: Position = "prompt[*]", keys: Position = "prompt[*]", heads: Any = None) -> Expr:
        """What the queries `at` give to the `keys`, in the heads named.

        Args:
            at: selector, index or slice of the queries.
            keys: of the prompt tokens attended to, equally many in every prompt.
            heads: one index, several, or None for all.
        """
        chosen = indices(heads, "heads")
        fields = {} if chosen is None else {"heads": chosen}
        return self._recorder.emit(ops.Read, site=self.site, at=selector(at), keys=selector(keys), **fields)

    def __getitem__(self, position: Position) -> Expr:
        return self.read(at=position)

    def __repr__(self) -> str:
        return f"<Patterns of {self.site}: read(at=, keys=, heads=) reads, t.knockout cuts edges>"


class SiteProxy:
    """`t.resid_post`: indexing gives one layer, slicing gives a family."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def __getitem__(self, layer: SupportsIndex | slice | Sequence[SupportsIndex]) -> Any:
        if not isinstance(layer, slice | list | tuple | range):
            return self._one(self.place(layer))
        places = self.places(layer)
        if self._name == PATTERN:
            return tuple(self._one(place) for place in places)
        return SiteFamily(self._recorder, places)

    def _one(self, place: sites.Site) -> SiteRows | Patterns:
        if self._name == PATTERN:
            return Patterns(self._recorder, place)
        return SiteRows(self._recorder, Place(place))

    def __setitem__(self, layer: SupportsIndex, value: Any) -> None:
        self._recorder.assign(Place(self.place(layer)), value)

    def places(self, layers: Any) -> list[sites.Site]:
        """The sites of one layer, of a slice or of several."""
        if isinstance(layers, slice):
            return [self.place(i) for i in self._range(layers)]
        return [self.place(i) for i in (layers if isinstance(layers, list | tuple | range) else [layers])]

    def place(self, layer: Any) -> sites.Site:
        """The site at a layer, counted from the end when it is negative."""
        count = self._recorder.model.n_layers
        number = whole(layer, "layer", "a layer")
        if not -count <= number < count:
            raise self._outside(layer)
        return sites.Site(self._name, number % count)

    def _range(self, layers: slice) -> range:
        count = self._recorder.model.n_layers
        if any(n is not None and not -count <= n <= count for n in (layers.start, layers.stop)):
            raise self._outside(layers)
        return range(*layers.indices(count))

    def _outside(self, layer: Any) -> errors.TrocarError:
        model = self._recorder.model
        return errors.refuse(
            "layer_out_of_range", "layer", f"{self._name}[{layer}]: {model.name} has {model.n_layers} layers"
        )
