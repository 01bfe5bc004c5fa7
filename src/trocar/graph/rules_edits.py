"""Type rules of edits: where they write, what they write, and that it is known in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trocar import errors, sites
from trocar.graph import ops, rules_sites
from trocar.graph.scope import Selection, Walk
from trocar.graph.shapes import Structure, Value, require_aligned


@dataclass(frozen=True, slots=True)
class Target:
    """Where an edit writes: a site's rows, or some columns of them."""

    site: sites.Site
    selection: Selection
    width: int
    name: str


def _target(node: ops.Edit, walk: Walk, path: str) -> Target:
    """The edit's place; its gate is checked on the way."""
    site = walk.site(node.site, f"{path}.site")
    if not site.spec.editable:
        pattern = site.name == rules_sites.PATTERN
        raise errors.refuse(
            "site_not_editable", f"{path}.site", f"{node.site!r} can be read but not written",
            next_step="Cut attention edges with edit.knockout." if pattern else None,
        )  # fmt: skip
    selection = _reached(node.at, walk, f"{path}.at")
    columns = rules_sites.columns(node, site, walk, path)
    width = walk.scope.model.width(site) if columns is None else len(columns)
    name = node.site if columns is None else f"the selected part of {node.site}"
    target = Target(site, selection, width, name)
    if node.gate is not None:
        _require_usable(node.gate, target, walk, f"{path}.gate")
    return target


def _reached(at: str, walk: Walk, path: str) -> Selection:
    selection = walk.select(at, path)
    first_gen = selection.rows[0].gen.start
    if not sum(selection.counts) and first_gen >= walk.scope.generation.max_new_tokens - (not walk.reads_gen):
        raise errors.refuse(
            "touches_nothing", path,
            f"{at!r}: the last generated token is never fed back, so with max_new_tokens="
            f"{walk.scope.generation.max_new_tokens} the edit reaches no row",
        )  # fmt: skip
    return selection


def _require_usable(ref: str, target: Target, walk: Walk, path: str) -> None:
    """Refuses a value whose rows are not the edit's, or that is known too late."""
    value, selection = walk.values[ref], target.selection
    if value.structure is Structure.ROW:
        require_aligned(value, selection.selector.text, selection.counts, selection.has_gen, path)
    in_prompt = sum(selection.counts) > 0
    only_later_tokens = not value.gen and not in_prompt
    if value.ready > walk.order(target.site) and not only_later_tokens:
        names = ", ".join(str(s) for s in value.sites)
        raise errors.refuse(
            "edit_after_layer", path, f"{ref!r} is read at {names}, which is computed after {target.site}"
        )
    if value.live and in_prompt:
        walk.whole = walk.whole or value.crossed or value.at != selection.selector.text


def _require_value(ref: str, target: Target, walk: Walk, path: str) -> None:
    value = walk.values[ref]
    if value.form == "pattern":
        raise errors.refuse("wrong_operand", path, f"{ref!r} is an attention pattern, not rows of a stream")
    if value.width != target.width:
        raise errors.refuse(
            "width_mismatch",
            path,
            f"{ref!r} has width {value.width}, {target.name} has width {target.width}",
        )
    _require_usable(ref, target, walk, path)


def _note_unit(node: ops.EditAdd | ops.EditClamp, target: Target, walk: Walk, path: str) -> None:
    if node.unit == "absolute":
        return
    model, site = walk.scope.model, target.site
    norms = getattr(model, "norms", {}).get(site.name, ())
    layer = site.layer or 0
    if layer >= len(norms):
        raise errors.refuse(
            "site_unavailable", f"{path}.unit", f"the mean norm of {site} was not measured on {model.name}",
            next_step='Use unit="absolute", or a site whose norm was measured.',
        )  # fmt: skip
    walk.scales[node.id] = norms[layer]


def edit_add(node: ops.EditAdd, walk: Walk, path: str) -> None:
    target = _target(node, walk, path)
    _require_value(node.value, target, walk, f"{path}.value")
    _note_unit(node, target, walk, path)


def edit_set(node: ops.EditSet | ops.EditProjectOut, walk: Walk, path: str) -> None:
    target = _target(node, walk, path)
    if node.value != ops.ZERO:
        _require_value(node.value, target, walk, f"{path}.value")


def edit_scale(node: ops.EditScale, walk: Walk, path: str) -> None:
    _target(node, walk, path)


def edit_clamp(node: ops.EditClamp, walk: Walk, path: str) -> None:
    target = _target(node, walk, path)
    _require_value(node.value, target, walk, f"{path}.value")
    if node.low is None and node.high is None:
        raise errors.refuse("missing_field", f"{path}.low", "edit.clamp needs low, high or both")
    if node.low is not None and node.high is not None and node.low > node.high:
        raise errors.refuse("bad_value", f"{path}.high", f"high {node.high:g} is below low {node.low:g}")
    _note_unit(node, target, walk, path)


def edit_affine(node: ops.EditAffine, walk: Walk, path: str) -> None:
    target = _target(node, walk, path)
    rank = walk.values[node.down].width
    if rank > ops.MAX_RANK:
        raise errors.refuse(
            "too_expensive", f"{path}.down", f"{node.down!r} has {rank} columns; the rank is at most {ops.MAX_RANK}",
            next_step="Use a lower rank.",
        )  # fmt: skip
    wanted = {
        "down": (target.width, rank),
        "up": (rank, target.width),
        "inner": (rank,),
        "bias": (target.width,),
    }
    for field, shape in wanted.items():
        ref = getattr(node, field)
        if ref is None:
            continue
        value = walk.values[ref]
        given = (value.height, value.width) if value.kind == "matrix" else (value.width,)
        if given != shape:
            raise errors.refuse(
                "width_mismatch", f"{path}.{field}",
                f"{ref!r} has shape {list(given)}; {field} is {list(shape)} for {target.name} at rank {rank}",
                next_step="down is [D, r], up [r, D], inner [r], bias [D]: transpose if needed.",
            )  # fmt: skip


def edit_sae(node: ops.EditSae, walk: Walk, path: str) -> None:
    for field in ("heads", "neurons"):
        if getattr(node, field) is not None:
            raise errors.refuse(
                "bad_value", f"{path}.{field}", f"a dictionary writes whole rows: edit.sae takes no {field}",
                next_step=f"Leave {field} out.",
            )  # fmt: skip
    target = _target(node, walk, path)
    dictionary = walk.values[node.sae]
    if dictionary.width != target.width:
        raise errors.refuse(
            "width_mismatch", f"{path}.sae",
            f"the dictionary {node.sae!r} has width {dictionary.width}, {node.site} has width {target.width}",
        )  # fmt: skip
    _require_features(node, dictionary, path)


def _require_features(node: ops.EditSae, dictionary: Value, path: str) -> None:
    if not node.features and node.keep_error:
        raise errors.refuse(
            "touches_nothing", f"{path}.features", "no feature is changed and the error is kept: nothing is edited",
            next_step="Name a feature, or set keep_error to false for the plain reconstruction.",
        )  # fmt: skip
    seen: set[int] = set()
    for i, feature in enumerate(node.features):
        where = f"{path}.features[{i}]"
        if feature.index >= dictionary.features:
            raise errors.refuse(
                "bad_value", f"{where}.index",
                f"{feature.index}: the dictionary has {dictionary.features} features, 0 to {dictionary.features - 1}",
            )  # fmt: skip
        if feature.index in seen:
            raise errors.refuse("bad_value", f"{where}.index", f"feature {feature.index} is named twice")
        if (feature.set is None) == (feature.scale is None):
            given = "neither" if feature.set is None else "both"
            raise errors.refuse(
                "bad_value", where, f"feature {feature.index} takes one of set and scale, and has {given}"
            )
        seen.add(feature.index)


def knockout(node: ops.EditKnockout, walk: Walk, path: str) -> None:
    site = walk.site(node.site, f"{path}.site")
    if site.name != rules_sites.PATTERN:
        raise errors.refuse(
            "bad_value", f"{path}.site", f"edit.knockout cuts edges at {rules_sites.PATTERN}, not at {node.site}",
            closest=f"{rules_sites.PATTERN}.{site.layer or 0}", next_step="Name attn_probs and a layer.",
        )  # fmt: skip
    queries = _reached(node.at, walk, f"{path}.at")
    keys = rules_sites.keys(node.keys, walk, f"{path}.keys")
    if node.heads is not None:
        rules_sites.heads(node.heads, site, walk.scope.model, f"{path}.heads")
    for i, (q, k) in enumerate(zip(queries.rows, keys.rows, strict=True)):
        _require_edges(q.prompt, k.prompt, queries.has_gen, i, node, path)


def _require_edges(
    queries: Sequence[int], keys: Sequence[int], has_gen: bool, prompt: int, node: ops.EditKnockout, path: str
) -> None:
    """Some edge is cut, and every query keeps a key: both follow from the ends of two ascending lists."""
    if not has_gen and queries[-1] < keys[0]:
        raise errors.refuse(
            "touches_nothing", f"{path}.keys",
            f"prompt {prompt}: no query of {node.at!r} sees a key of {node.keys!r}: they come later",
            next_step="A token attends to itself and to earlier tokens: choose earlier keys or later queries.",
        )  # fmt: skip
    if len(queries) and queries[0] < _prefix(keys):
        raise errors.refuse(
            "no_keys_left", f"{path}.keys",
            f"prompt {prompt}: the query at position {queries[0]} would lose every key it sees",
        )  # fmt: skip


def _prefix(keys: Sequence[int]) -> int:
    """How many of the keys are 0, 1, 2, ... without a gap."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] == middle:
            low = middle + 1
        else:
            high = middle
    return low
