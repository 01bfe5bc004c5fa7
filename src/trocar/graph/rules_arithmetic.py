"""Type rules of arithmetic: what may be combined, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

from trocar import errors
from trocar.graph import ops
from trocar.graph.scope import Walk
from trocar.graph.shapes import Structure, Value, combine, joined, kind_of


def _noted(value: Value, walk: Walk) -> Value:
    """A value that takes from rows of other tokens needs the whole prompt at once."""
    walk.whole = walk.whole or value.crossed
    return value


def add(node: ops.Add | ops.Sub, walk: Walk, path: str) -> Value:
    return _noted(combine(walk.values[node.a], walk.values[node.b], path), walk)


def scale(node: ops.Scale, walk: Walk, path: str) -> Value:
    of = walk.values[node.of]
    if not isinstance(node.by, str):
        return replace(of, form="made")
    return _noted(joined((of, walk.values[node.by]), of.content, of.width, path), walk)


def dot(node: ops.Dot, walk: Walk, path: str) -> Value:
    a, b = walk.values[node.a], walk.values[node.b]
    if a.width != b.width:
        raise errors.refuse("width_mismatch", path, f"widths {a.width} and {b.width} differ")
    if a.structure is b.structure is Structure.REQUEST:
        raise errors.refuse("wrong_operand", f"{path}.a", f"dot needs rows on one side, not {a.kind} twice")
    return _noted(joined((a, b), "number", 1, path), walk)


def matmul(node: ops.MatMul, walk: Walk, path: str) -> Value:
    a, b = walk.values[node.a], walk.values[node.b]
    if a.width != b.height:
        raise errors.refuse(
            "width_mismatch", f"{path}.b",
            f"{node.a!r} has width {a.width}, {node.b!r} is [{b.height}, {b.width}]: it takes width {b.height}",
        )  # fmt: skip
    if b.width > ops.MAX_RANK:
        raise errors.refuse(
            "too_expensive", f"{path}.b", f"{node.b!r} has {b.width} columns; matmul takes at most {ops.MAX_RANK}",
            next_step="Send fewer columns.",
        )  # fmt: skip
    return replace(a, width=b.width, form="made")


def norm(node: ops.Norm, walk: Walk, path: str) -> Value:
    return joined((walk.values[node.of],), "number", 1, path)


def rowwise(node: ops.Normalize | ops.Relu, walk: Walk, _path: str) -> Value:
    return replace(walk.values[node.of], form="made")


def topk(node: ops.TopK, walk: Walk, path: str) -> Value:
    value = walk.values[node.of]
    if node.k > value.width:
        raise errors.refuse("bad_value", f"{path}.k", f"k is {node.k}; {node.of!r} has width {value.width}")
    return replace(value, form="made")


def mean(node: ops.Mean, walk: Walk, path: str) -> Value:
    value = walk.values[node.of]
    if node.over == "width":
        if value.content != "wide":
            raise errors.refuse(
                "wrong_operand", f"{path}.of", f"{node.of!r} is {value.kind}: it has no width to average over"
            )
        return joined((value,), "number", 1, path)
    if value.structure is not Structure.ROW:
        raise errors.refuse(
            "wrong_operand", f"{path}.of", f"{node.of!r} is {value.kind}: it has one row per prompt already"
        )
    require_counted(value, node.of, f"{path}.of")
    walk.whole = walk.whole or value.live
    kind = kind_of(Structure.PROMPT, value.content)
    counts = (1,) * len(value.counts)
    return replace(value, kind=kind, counts=counts, at=None, form="made", crossed=value.live)


def require_counted(value: Value, name: str, path: str) -> None:
    """Refuses a mean over rows whose number is not known in advance, or is 0."""
    if value.gen:
        raise errors.refuse(
            "wrong_operand", path,
            f"{name!r} has rows of generated tokens; their number is not known in advance",
            next_step="Take the mean over prompt[...] rows, or capture the rows and fit on the server.",
        )  # fmt: skip
    if 0 in value.counts:
        raise errors.refuse(
            "rows_mismatch", path, f"{name!r} has no row for prompt {value.counts.index(0)}",
            next_step="Leave that prompt out, or capture rows of its prompt tokens.",
        )  # fmt: skip


def encode(node: ops.Encode, walk: Walk, path: str) -> Value:
    of, dictionary = walk.values[node.of], walk.values[node.sae]
    if of.width != dictionary.width:
        raise errors.refuse(
            "width_mismatch", f"{path}.of",
            f"{node.of!r} has width {of.width}, the dictionary {node.sae!r} reads width {dictionary.width}",
        )  # fmt: skip
    return replace(of, width=dictionary.features, form="made")


def compare(node: ops.Eq | ops.Gt | ops.Lt, walk: Walk, path: str) -> Value:
    values = [walk.values[node.a]]
    if isinstance(node.b, str):
        values.append(walk.values[node.b])
    return _noted(joined(values, "truth", 1, path), walk)


def both(node: ops.And | ops.Or, walk: Walk, path: str) -> Value:
    return _noted(joined((walk.values[node.a], walk.values[node.b]), "truth", 1, path), walk)


def where(node: ops.Where, walk: Walk, path: str) -> Value:
    cond, a, b = (walk.values[ref] for ref in (node.cond, node.a, node.b))
    same = combine(a, b, path)
    return _noted(joined((cond, a, b), same.content, same.width, path), walk)


def negate(node: ops.Not, walk: Walk, _path: str) -> Value:
    return walk.values[node.of]
