"""Along which directions of their sites the numbers of a program can lie. Pure; follows the ops, never data.

A number that is one linear function of its rows lies along one direction. Everything that chooses, multiplies or
bends (a mask, a product, a relu, a top-k) makes a number that mixes several, and rows can say which of them shows
where: such a number counts as all of them. A product of rows with rows has as many directions as rows, and others
each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.graph.shapes import Value
from trocar.graph.spec import SPEC
from trocar.graph.streams import same
from trocar.sites import Site, parse


@dataclass(frozen=True, slots=True)
class Content:
    """What a constant brings in.

    Attributes:
        digest: of its numbers.
        nonzeros: how many of them are not 0.
    """

    digest: str
    nonzeros: int


@dataclass(frozen=True, slots=True)
class Atom:
    """Directions that are counted together.

    Attributes:
        digest: of what is computed; of the request too where rows say which directions these are.
        rank: how many there are at most.
        sites: where.
    """

    digest: str
    rank: int
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """What is known of a node.

    Attributes:
        digest: of what it computes: its fields, with operands replaced by what they compute.
        constant: whether no row is in it; `rank` is then how many of its numbers are not 0.
        linear: whether it is one linear function of its rows.
        rank: directions that one product with a constant mixes; of numbers that are not linear 0, they are atoms.
        split: whether each of a row's numbers has directions of its own, and not all share them.
        free: whether rows, and not only constants, say which directions these are.
        atoms: bits of the atoms that it mixes in besides.
        sources: bits of the nodes whose rows it is made of.
    """

    digest: str
    constant: bool = False
    linear: bool = False
    rank: int = 0
    split: bool = False
    free: bool = False
    atoms: int = 0
    sources: int = 0

    @property
    def blended(self) -> bool:
        """Whether its length can tell a product of rows with other rows, or with constants that rows chose."""
        return not self.linear or self.sources.bit_count() > 1


class Spans:
    """The spans of a program's nodes, node by node.

    Args:
        contents: by `tensor` and `sae` node.
        request: digest of the whole request: what rows determine is never the same twice.
    """

    def __init__(self, checked: Checked, contents: Mapping[str, Content], request: str) -> None:
        self._checked = checked
        self._contents = contents
        self._request = request
        self._known: dict[str, Span] = {}
        self._numbers: dict[str, int] = {}  # of the atoms, by digest
        self.atoms: list[Atom] = []

    def enter(self, node: ops.Node) -> None:
        """Works a node out; those before it are known."""
        given = {ref: self._known[ref].digest for ref in operands(node)}
        rule = _RULES.get(type(node))
        if rule is not None:
            self._known[node.id] = rule(self, node, digest(node, given, self._contents))

    def scored(self, node: ops.Score) -> int:
        """Bits of the atoms that a score shows."""
        span = self._known[node.of]
        if node.probe is None:
            return self._settled(node.of)
        made = digest(node, {node.of: span.digest}, self._contents)
        value = self._checked.values[node.of]
        return self._whole(self._product(node.id, made, span, value.width, value), made, value)

    # ---- numbers ----

    def _atom(self, made: str, rank: int, sites: tuple[Site, ...]) -> int:
        if made not in self._numbers:
            self._numbers[made] = len(self.atoms)
            self.atoms.append(Atom(made, rank, sites))
        return 1 << self._numbers[made]

    def _settled(self, ref: str) -> int:
        """Bits of all that a number shows."""
        span = self._known[ref]
        return self._whole(span, span.digest, self._checked.values[ref])

    def _whole(self, span: Span, made: str, value: Value) -> int:
        return self._atom(made, 1, value.sites) if span.linear else span.atoms

    def _chosen(self, node: str, value: Value) -> int:
        """Bits of directions that rows determine: as many as there are rows, and others in every request."""
        return self._atom(sha256([self._request, node]), rows(value, self._checked), value.sites)

    def _product(self, node: str, made: str, wide: Span, nonzeros: int, value: Value) -> Span:
        """A number made of a wide value's numbers, of which `nonzeros` count."""
        if wide.linear:
            return replace(wide, digest=made)
        atoms = wide.atoms
        if wide.free:
            atoms |= self._chosen(node, value)
        elif wide.rank:
            atoms |= self._atom(made, wide.rank * (nonzeros if wide.split else 1), value.sites)
        return Span(made, atoms=atoms, sources=wide.sources)

    # ---- rules: node and digest in, span out ----

    def _rows(self, node: ops.Read | ops.Stored, made: str) -> Span:
        return Span(made, linear=True, rank=1, sources=self._source())

    def _source(self) -> int:
        return 1 << len(self._known)

    def _constant(self, node: ops.Tensor | ops.Vector | ops.Sae, made: str) -> Span:
        known = self._contents[node.id].nonzeros if node.id in self._contents else None
        return Span(made, constant=True, rank=self._checked.values[node.id].width if known is None else known)

    def _sum(self, node: ops.Pair, made: str) -> Span:
        a, b = self._known[node.a], self._known[node.b]
        if all(x.constant or x.linear for x in (a, b)):
            rank = 1 if a.linear or b.linear else min(a.rank + b.rank, self._checked.values[node.id].width)
            constant = a.constant and b.constant
            return Span(made, constant, not constant, rank, sources=a.sources | b.sources)
        return self._mixed(made, node.a, node.b)

    def _mixed(self, made: str, *refs: str) -> Span:
        """Rows, or numbers, of which rows can say which one shows."""
        spans = [self._known[ref] for ref in refs]
        wide = self._checked.values[refs[0]].content == "wide"
        mixed = [span for span in spans if not span.constant]
        atoms = 0
        for ref, span in zip(refs, spans, strict=True):
            atoms |= span.atoms if wide else self._settled(ref)
        return Span(
            made,
            rank=sum(span.rank for span in mixed) if wide else 0,
            split=any(span.split for span in mixed),
            free=any(span.free for span in mixed),
            atoms=atoms,
            sources=_union(spans),
        )

    def _scale(self, node: ops.Scale, made: str) -> Span:
        of = self._known[node.of]
        if not isinstance(node.by, str):
            return replace(of, digest=made)
        by = self._known[node.by]
        if of.constant and by.linear:
            return replace(by, digest=made)
        rest = Span(made, sources=by.sources) if of.constant else self._mixed(made, node.of)
        return replace(rest, atoms=rest.atoms | self._settled(node.by), sources=rest.sources | by.sources)

    def _dot(self, node: ops.Dot, made: str) -> Span:
        a, b, value = self._known[node.a], self._known[node.b], self._checked.values[node.id]
        for fixed, other in ((a, b), (b, a)):
            if fixed.constant:
                return self._product(node.id, made, other, fixed.rank, value)
        atoms = a.atoms | b.atoms | self._chosen(node.id, value)  # each row has a direction of its own
        return Span(made, atoms=atoms, sources=a.sources | b.sources)

    def _matmul(self, node: ops.MatMul, made: str) -> Span:
        of = self._known[node.a]
        if of.constant:
            return Span(made, constant=True, rank=self._checked.values[node.id].width)
        return self._joined(of, made, self._checked.values[node.a])

    @staticmethod
    def _joined(of: Span, made: str, value: Value) -> Span:
        """Numbers each of which is made of all numbers of a row."""
        rank = of.rank * value.width if of.split else of.rank
        return replace(of, digest=made, rank=rank, split=False)

    def _encode(self, node: ops.Encode, made: str) -> Span:
        of = self._joined(self._known[node.of], made, self._checked.values[node.of])
        return replace(of, linear=False, split=not self._known[node.of].split)

    def _norm(self, node: ops.Norm, made: str) -> Span:
        of = replace(self._known[node.of], linear=False, free=self._known[node.of].blended)
        return self._product(node.id, made, of, 1, self._checked.values[node.id])

    def _normalize(self, node: ops.Normalize, made: str) -> Span:
        of = self._known[node.of]
        if of.constant:
            return replace(of, digest=made)
        return replace(of, digest=made, linear=False, free=of.blended)

    def _bent(self, node: ops.Relu | ops.TopK, made: str) -> Span:
        of = self._known[node.of]
        if of.constant:
            return replace(of, digest=made)
        if self._checked.values[node.of].content != "wide":
            return self._mixed(made, node.of)
        return replace(of, digest=made, linear=False, split=True)

    def _mean(self, node: ops.Mean, made: str) -> Span:
        of, value = self._known[node.of], self._checked.values[node.of]
        if node.over == "width":
            return self._product(node.id, made, of, value.width, self._checked.values[node.id])
        # other rows than those it was made of: with them it makes products of rows with rows
        sources = self._source() | (of.sources if of.sources.bit_count() > 1 else 0)
        return replace(of, digest=made, sources=sources)

    def _compare(self, node: ops.Comparison, made: str) -> Span:
        return self._mixed(made, node.a, *((node.b,) if isinstance(node.b, str) else ()))

    def _both(self, node: ops.Pair, made: str) -> Span:
        return self._mixed(made, node.a, node.b)

    def _not(self, node: ops.Not, made: str) -> Span:
        return self._mixed(made, node.of)

    def _where(self, node: ops.Where, made: str) -> Span:
        mixed, cond = self._mixed(made, node.a, node.b), self._known[node.cond]
        return replace(
            mixed, atoms=mixed.atoms | self._settled(node.cond), sources=mixed.sources | cond.sources
        )


_RULES: Final[dict[type[ops.Node], Callable[[Spans, Any, str], Span]]] = {
    ops.Read: Spans._rows,
    ops.Stored: Spans._rows,
    ops.Tensor: Spans._constant,
    ops.Vector: Spans._constant,
    ops.Sae: Spans._constant,
    ops.Add: Spans._sum,
    ops.Sub: Spans._sum,
    ops.Scale: Spans._scale,
    ops.Dot: Spans._dot,
    ops.MatMul: Spans._matmul,
    ops.Norm: Spans._norm,
    ops.Normalize: Spans._normalize,
    ops.Relu: Spans._bent,
    ops.TopK: Spans._bent,
    ops.Mean: Spans._mean,
    ops.Encode: Spans._encode,
    ops.Eq: Spans._compare,
    ops.Gt: Spans._compare,
    ops.Lt: Spans._compare,
    ops.And: Spans._both,
    ops.Or: Spans._both,
    ops.Not: Spans._not,
    ops.Where: Spans._where,
}
"""Every op that has a value; a test holds it and the table of the language together."""


def _union(spans: list[Span]) -> int:
    found = 0
    for span in spans:
        found |= span.sources
    return found


def operands(node: ops.Node) -> tuple[str, ...]:
    """The earlier nodes that a node takes."""
    given = [getattr(node, name) for name in SPEC[node.op].takes]  # type: ignore[attr-defined]
    refs = [ref for each in given for ref in (each if isinstance(each, tuple) else (each,))]
    return tuple(ref for ref in refs if isinstance(ref, str) and ref != ops.ZERO)


def rows(value: Value, checked: Checked) -> int:
    """Most rows over all prompts."""
    return sum(value.counts) if value.at is None else checked.selections[value.at].most_rows


# ---- digests ----

_UNSAID: Final = {"id", "at", "name", "w_enc", "b_enc", "w_dec", "b_dec", "threshold"}
"""Names of nodes and arrays, and which tokens: not what is computed."""


def digest(node: ops.Node, known: Mapping[str, str], contents: Mapping[str, Content]) -> str:
    """Of what a node computes."""
    fields: dict[str, Any] = node.model_dump(mode="json", exclude=_UNSAID)
    for name in SPEC[fields["op"]].takes:
        fields[name] = _named(fields.get(name), known)
    if isinstance(node, ops.Read):
        fields["site"] = str(same(parse(node.site)))
    brought = contents[node.id].digest if isinstance(node, ops.Tensor | ops.Sae) else ""
    return sha256([fields, brought])


def _named(given: Any, known: Mapping[str, str]) -> Any:
    if isinstance(given, list):
        return [_named(each, known) for each in given]
    return known.get(given, given) if isinstance(given, str) else given


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
