"""The automatic checks of the airlock: pass, review or fail, each reason with a code. Pure.

They see a description of what is to leave (where each part was read, from what it was made, how far behind an
edit) and two facts about its numbers. They stop what reviewers cannot see by eye: both ends of one matrix,
rows in the reach of an edit, gradients. A check that fails cannot be overruled. None of them is the bound:
that is the ledger, which charges every bit whatever the checks said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.gate import plain_text
from trocar.graph import linear_maps, streams
from trocar.graph.labels import Label
from trocar.graph.linear_maps import LINEAR_MAPS, LinearMap
from trocar.sites import Site
from trocar.wire import packing

WIDTHS: Final = (4, 8)
"""Bits of one number that may leave: none is finer, whatever the tier."""
MOST_PARTS: Final = 1024
MOST_TEXTS: Final = 256
LEAST_FITTED: Final = 8
"""A fit that leans on fewer rows is close to being those rows."""
_FEW_ROWS: Final = 8
_BLOCK: Final = 256
_ONE_HOT: Final = 0.99
"""A column is like a unit vector when one number holds this share of its squares."""


class ExportKind(StrEnum):
    """What is to leave: stored rows, or what was made from rows."""

    rows = "rows"
    artifact = "artifact"


class Origin(StrEnum):
    """How the numbers of a part came to be.

    Attributes:
        read: rows as they were captured.
        fit: fitted to targets that the user supplied (probe, direction).
        activation_fit: fitted to activations: from one site to the next, it is the weight matrix.
        trained: an adapter or dictionary that was trained from a random start.
        weight_init: what started from the model's own matrices (PiSSA, singular vectors, merged weights).
        optimiser: moments of gradients.
    """

    read = "read"
    fit = "fit"
    activation_fit = "activation_fit"
    trained = "trained"
    weight_init = "weight_init"
    optimiser = "optimiser"


class Disposition(StrEnum):
    """How the checks end."""

    passed = "pass"
    review = "review"
    fail = "fail"


class Check(StrEnum):
    """The codes of reasons."""

    no_parts = "no_parts"
    bad_name = "bad_name"
    bad_text = "bad_text"
    wrong_origin = "wrong_origin"
    label = "label"
    weight_init = "weight_init"
    optimiser = "optimiser"
    activation_targets = "activation_targets"
    no_rows = "no_rows"
    no_site = "no_site"
    logits = "logits"
    early_layer = "early_layer"
    near_write = "near_write"
    few_rows = "few_rows"
    linear_map = "linear_map"
    not_finite = "not_finite"
    too_many_bytes = "too_many_bytes"
    rows = "rows"
    trained = "trained"
    large = "large"
    one_hot = "one_hot"
    linear_map_earlier = "linear_map_earlier"


FROM_NUMBERS: Final = {
    Check.not_finite: "some numbers are NaN or infinite",
    Check.one_hot: "columns look like unit vectors: were the inputs chosen?",
}
"""What is found in the numbers themselves; everything else follows from the request."""
_FAILS: Final[dict[Origin, tuple[Check, str]]] = {
    Origin.activation_fit: (
        Check.activation_targets,
        "was fitted to activations, which is how a matrix is read",
    ),
    Origin.weight_init: (Check.weight_init, "started from the model's own weights"),
    Origin.optimiser: (Check.optimiser, "is the state of an optimiser, which is made of gradients"),
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the checks know of a part's numbers.

    Attributes:
        finite: whether all of them are, and none is too large to be rounded.
        one_hot_columns: columns in which a single number is nearly all.
    """

    finite: bool
    one_hot_columns: int


@dataclass(frozen=True, slots=True)
class Part:
    """One array of what is to leave, `rows` x `width`.

    Attributes:
        site: where it was read, or where the rows of its fit were; None for what has no such place.
        blocks: whole blocks between the last user write upstream and the read; None: nothing was written.
        first: whether the row of position 0 is among the rows (or the rows of the fit).
        texts: words that go with it, for example the classes of a probe.
        leans_on: rows that a fit leans on (`analysis.leans_on`); None for what was not fitted to labels.
    """

    name: str
    origin: Origin
    label: Label
    site: Site | None
    rows: int
    width: int
    numbers: Numbers
    blocks: int | None = None
    first: bool = False
    texts: tuple[str, ...] = ()
    leans_on: int | None = None

    @property
    def few(self) -> bool:
        """Whether it is a fit to so few rows that it is as good as those."""
        return self.leans_on is not None and self.leans_on < LEAST_FITTED

    @property
    def tells_rows(self) -> bool:
        """Whether rows of its site can be had from it."""
        return self.origin is Origin.read or self.few


@dataclass(frozen=True, slots=True)
class Description:
    """What is to leave.

    Attributes:
        earlier: sites whose rows the author's project got from this lineage before.
    """

    kind: ExportKind
    parts: tuple[Part, ...]
    earlier: tuple[Site, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportTerms:
    """What the policy says about exports.

    Attributes:
        first_raw_layer: rows leave from this layer on.
        least_blocks: whole blocks that must lie between a write and the rows that leave.
        own_targets: whether fits to activations may leave.
        vector_bits: bits of one number, 4 or 8.
        review_bytes: artifacts above this size are looked at by people.
        most_bytes: nothing larger leaves in one request.
        maps: pairs of sites of which one request may hold one.
        rows: whether rows may leave at all.
        rows_reviewed: whether people look at rows, whatever else is found.
        one_hot_reviewed: whether people look at columns that are like unit vectors.
    """

    first_raw_layer: int = 2
    least_blocks: int = 1
    own_targets: bool = False
    vector_bits: int = 8
    review_bytes: int = 1_000_000
    most_bytes: int = 64_000_000
    maps: tuple[LinearMap, ...] = LINEAR_MAPS
    rows: bool = True
    rows_reviewed: bool = True
    one_hot_reviewed: bool = True

    def __post_init__(self) -> None:
        if self.vector_bits not in WIDTHS:
            raise errors.refuse(
                "bad_value", "bits", f"a number leaves in 4 or 8 bits, not {self.vector_bits!r}"
            )

    def packed_bytes(self, description: Description) -> int:
        """Bytes of all parts as they would leave."""
        return sum(packing.packed_bytes(p.rows, p.width, self.vector_bits) for p in description.parts)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why the checks did not pass what is to leave; `path` is the part that it is about."""

    code: Check
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Checked:
    """The end of all checks; the reasons are those of the worst disposition found."""

    disposition: Disposition
    reasons: tuple[Reason, ...]


def check(description: Description, terms: ExportTerms) -> Checked:
    """Runs every check; one that fails outweighs those that ask for a review."""
    failed = (*_fails(description, terms), *_size_fails(description, terms), *_map_fails(description, terms))
    if failed:
        return Checked(Disposition.fail, failed)
    doubts = tuple(_doubts(description, terms))
    return Checked(Disposition.review if doubts else Disposition.passed, doubts)


def told(reasons: Sequence[Reason]) -> tuple[Reason, ...]:
    """What an author may know: a thing found in numbers is named once, without where and how often."""
    found = (Reason(r.code, "parts", FROM_NUMBERS[r.code]) if r.code in FROM_NUMBERS else r for r in reasons)
    return tuple(dict.fromkeys(found))


def measure(values: npt.NDArray[Any]) -> Numbers:
    """The facts about an array `[rows, width]` that the checks use."""
    if not (np.abs(values) < packing.LARGEST).all():  # also true for NaN
        return Numbers(finite=False, one_hot_columns=0)
    if len(values) < _FEW_ROWS:
        return Numbers(finite=True, one_hot_columns=0)
    most, total = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for i in range(0, len(values), _BLOCK):  # in between, a number takes eight bytes
        squares = values[i : i + _BLOCK].astype(np.float64) ** 2
        most, total = np.maximum(most, squares.max(axis=0)), total + squares.sum(axis=0)
    alone = (most >= _ONE_HOT * total) & (most > 0)
    return Numbers(finite=True, one_hot_columns=int(alone.sum()))


def _fails(description: Description, terms: ExportTerms) -> Iterator[Reason]:
    names = [part.name for part in description.parts]
    for i, part in enumerate(description.parts):
        for code, text in _part_fails(part, description.kind, terms):
            yield Reason(code, f"parts[{i}]", text)
        if not plain_text.is_name(part.name) or names.index(part.name) != i:
            yield Reason(Check.bad_name, f"parts[{i}].name", "each part has its own name of plain letters")
        if len(part.texts) > MOST_TEXTS or any(
            plain_text.fault(t, plain_text.MOST_WORDS) for t in part.texts
        ):
            yield Reason(
                Check.bad_text, f"parts[{i}].texts", "its words are too many, too long or not printable"
            )


def _part_fails(part: Part, kind: ExportKind, terms: ExportTerms) -> Iterator[tuple[Check, str]]:
    if (part.origin is Origin.read) is not (kind is ExportKind.rows):
        yield (
            Check.wrong_origin,
            f"{part.origin.value!r} numbers do not leave in a request for {kind.value!r}",
        )
    mapped = part.origin is Origin.activation_fit and terms.own_targets
    if part.label >= Label.GRAD and not mapped:
        yield Check.label, f"numbers of the label {part.label.name} never leave"
    if part.origin in _FAILS and not mapped:
        code, why = _FAILS[part.origin]
        yield code, f"the part {why}"
    if not part.numbers.finite:
        yield Check.not_finite, FROM_NUMBERS[Check.not_finite]
    if part.site is not None and part.site.name == "logits":
        yield Check.logits, "logits of the whole vocabulary give the unembedding away"
    if kind is ExportKind.rows:
        yield from _row_fails(part, terms)
    elif part.few and (_near(part, terms) or (part.site is not None and _early(part.site, terms))):
        yield Check.few_rows, f"it leans on {part.leans_on} rows, and those would not leave"


def _row_fails(part: Part, terms: ExportTerms) -> Iterator[tuple[Check, str]]:
    if not terms.rows:
        yield Check.no_rows, "rows never leave under this policy"
    if part.site is None:
        yield Check.no_site, "rows leave only when it is known where they were read"
    elif _early(part.site, terms):
        least = terms.first_raw_layer
        yield (
            Check.early_layer,
            f"{str(part.site)!r} lies before layer {least}, where tokens are still embeddings",
        )
    if _near(part, terms):
        yield (
            Check.near_write,
            f"{part.blocks} whole blocks lie between a write and the read, not {terms.least_blocks}",
        )


def _early(site: Site, terms: ExportTerms) -> bool:
    """Whether a site lies before the first layer that may leave."""
    depth = streams.depth(site)
    return depth is not None and depth < terms.first_raw_layer


def _near(part: Part, terms: ExportTerms) -> bool:
    return part.blocks is not None and part.blocks < terms.least_blocks


def _size_fails(description: Description, terms: ExportTerms) -> Iterator[Reason]:
    if not 0 < len(description.parts) <= MOST_PARTS:
        yield Reason(Check.no_parts, "parts", f"a request has 1 to {MOST_PARTS} parts")
    amount = terms.packed_bytes(description)
    if amount > terms.most_bytes:
        yield Reason(
            Check.too_many_bytes, "parts", f"{amount} bytes; one request may hold {terms.most_bytes}"
        )


def _map_fails(description: Description, terms: ExportTerms) -> Iterator[Reason]:
    for source, target in _ends(description.parts, (), terms):
        yield Reason(Check.linear_map, "parts", _both(source, target, "the parts hold"))


def _ends(
    parts: tuple[Part, ...], more: tuple[Site, ...], terms: ExportTerms
) -> tuple[tuple[Site, Site], ...]:
    here = [p for p in parts if p.tells_rows and p.site is not None]
    every = [p.site for p in here if p.site is not None]
    first = [p.site for p in here if p.site is not None and p.first]
    return linear_maps.ends((*every, *more), (*first, *more), terms.maps)


def _both(source: Site, target: Site, who: str) -> str:
    ends = f"{str(source)!r} and {str(target)!r}"
    return f"{who}, or let anybody compute, both {ends}, the two ends of one matrix"


def _doubts(description: Description, terms: ExportTerms) -> Iterator[Reason]:
    if description.kind is ExportKind.rows and terms.rows_reviewed:
        yield Reason(Check.rows, "parts", "rows are looked at by people, always")
        for source, target in _ends(description.parts, description.earlier, terms):
            text = _both(source, target, "together with earlier exports, they hold")
            yield Reason(Check.linear_map_earlier, "parts", text)
    amount = terms.packed_bytes(description)
    if amount > terms.review_bytes:
        yield Reason(Check.large, "parts", f"{amount} bytes; up to {terms.review_bytes} need no look")
    for i, part in enumerate(description.parts):
        yield from _part_doubts(part, f"parts[{i}]", terms)


def _part_doubts(part: Part, path: str, terms: ExportTerms) -> Iterator[Reason]:
    if part.origin is Origin.trained:
        yield Reason(Check.trained, path, "what was trained on activations may hold much of the layer")
    if part.numbers.one_hot_columns and terms.one_hot_reviewed:
        count = part.numbers.one_hot_columns
        yield Reason(Check.one_hot, path, f"{count} columns look like unit vectors: were the inputs chosen?")
    if part.few and terms.rows_reviewed:
        yield Reason(Check.few_rows, path, f"it leans on {part.leans_on} rows, and is close to being those")
    if part.site is not None and _early(part.site, terms):
        yield Reason(
            Check.early_layer, path, f"made at {str(part.site)!r}, where tokens are still embeddings"
        )
    if _near(part, terms):
        yield Reason(Check.near_write, path, "made from rows within the reach of a write")
