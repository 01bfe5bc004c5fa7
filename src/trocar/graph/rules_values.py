"""Type rules of reads and constants: where values come from.

A rule sees its node and a `Walk` (the static scope plus the values of earlier nodes) and returns the node's
`Value`, None for edits and outputs. It raises `ProgramError` with a path. Rules never look at data.
"""

from __future__ import annotations

from typing import Final

from trocar import errors, sites
from trocar.graph import ops, positions, rules_sites
from trocar.graph.facts import HandleFacts
from trocar.graph.labels import Label
from trocar.graph.scope import Selection, Walk
from trocar.graph.shapes import Form, Value

MAX_STORED_ROWS: Final = 4_000_000


def read(node: ops.Read, walk: Walk, path: str) -> Value:
    site = walk.site(node.site, f"{path}.site")
    selection = walk.select(node.at, f"{path}.at")
    if site.name == rules_sites.PATTERN:
        return _rows(_pattern_width(node, site, walk, path), site, selection, walk, "pattern")
    if node.keys is not None:
        raise errors.refuse(
            "bad_value", f"{path}.keys", f"keys belong to attn_probs; {node.site} has none",
            next_step="Leave keys out, or read attn_probs.",
        )  # fmt: skip
    columns = rules_sites.columns(node, site, walk, path)
    if columns is None:
        return _rows(walk.scope.model.width(site), site, selection, walk, "read")
    return _rows(len(columns), site, selection, walk, "part")


def _rows(width: int, site: sites.Site, selection: Selection, walk: Walk, form: Form) -> Value:
    return Value(
        "rows",
        width,
        Label.ACT,
        selection.counts,
        selection.selector.text,
        selection.has_gen,
        walk.order(site),
        (site,),
        form=form,
        live=True,
    )


def _pattern_width(node: ops.Read, site: sites.Site, walk: Walk, path: str) -> int:
    model = walk.scope.model
    if node.neurons is not None:
        raise errors.refuse("bad_value", f"{path}.neurons", f"{node.site} has heads and keys, no neurons")
    if node.keys is None:
        raise errors.refuse(
            "missing_field",
            f"{path}.keys",
            f"a read of {node.site} needs keys: the prompt tokens attended to",
        )
    n_heads = model.n_heads
    if node.heads is not None:
        n_heads = len(rules_sites.heads(node.heads, site, model, f"{path}.heads"))
    keys = rules_sites.keys(node.keys, walk, f"{path}.keys")
    return n_heads * rules_sites.key_count(keys, f"{path}.keys")


def _shape(name: str, walk: Walk, path: str) -> tuple[int, ...]:
    known = walk.scope.tensors
    if name not in known:
        near = errors.closest(name, known)
        raise errors.refuse("unknown_tensor", path, f"the request carries no tensor {name!r}", closest=near)
    return known[name]


def tensor(node: ops.Tensor, walk: Walk, path: str) -> Value:
    shape = _shape(node.name, walk, f"{path}.name")
    if len(shape) == 1:
        return Value("vector", shape[0], Label.USER)
    if len(shape) != 2:
        raise errors.refuse("bad_tensor", f"{path}.name", f"{node.name!r} has shape {shape}")
    return Value("matrix", shape[1], Label.USER, height=shape[0])


def artifact(handle: str, walk: Walk, path: str) -> HandleFacts:
    """Facts of a fit's handle."""
    return _handle(handle, "artifact", walk, path)


def _handle(handle: str, kind: str, walk: Walk, path: str) -> HandleFacts:
    facts = walk.scope.handles.get(handle)
    if facts is None:
        raise errors.ProgramError(
            [errors.refusal("handle_not_found", path, f"there is no handle {handle!r}")]
        )
    if facts.kind != kind:
        raise errors.refuse("wrong_handle", path, f"{handle!r} holds {facts.kind}, not {kind}")
    if facts.fingerprint != walk.scope.model.fingerprint:
        raise errors.refuse(
            "wrong_handle", path, f"{handle!r} was made on another model than {walk.scope.model.name!r}"
        )
    return facts


def held_width(facts: HandleFacts, site: str, path: str) -> int:
    """Width of what a handle holds for a site."""
    if site not in facts.widths:
        near = errors.closest(site, facts.widths)
        raise errors.refuse(
            "wrong_handle", path, f"{facts.handle!r} holds nothing for {site!r}", closest=near
        )
    return facts.widths[site]


def vector(node: ops.Vector, walk: Walk, path: str) -> Value:
    facts = artifact(node.handle, walk, f"{path}.handle")
    if node.part == "weights" and not facts.has_probe:
        raise errors.refuse("wrong_handle", f"{path}.part", f"{node.handle!r} is a direction without weights")
    return Value("vector", held_width(facts, node.site, f"{path}.site"), Label.ACT)


def stored(node: ops.Stored, walk: Walk, path: str) -> Value:
    facts = _handle(node.handle, "activations", walk, f"{path}.handle")
    width = held_width(facts, node.site, f"{path}.site")
    chosen = _stored_prompts(node, facts, walk, path)
    rows = _stored_rows(node, facts, chosen, walk, path)
    walk.stored[node.id] = tuple(zip(chosen, rows, strict=True))
    return Value(
        "rows",
        width,
        Label.ACT,
        tuple(len(r) for r in rows),
        sites=(sites.parse(node.site, f"{path}.site"),),
        form="stored",
    )


def _stored_prompts(node: ops.Stored, facts: HandleFacts, walk: Walk, path: str) -> tuple[int, ...]:
    """Which stored prompt each prompt of this request gets."""
    held, asked = len(facts.rows_per_prompt), len(walk.scope.lengths)
    if node.prompts is None:
        if held != asked:
            raise errors.refuse(
                "rows_mismatch", f"{path}.handle",
                f"{node.handle!r} holds rows of {held} prompts, this request has {asked}",
                next_step="Name a stored prompt for each of this request's with `prompts`.",
            )  # fmt: skip
        return tuple(range(held))
    if len(node.prompts) != asked:
        raise errors.refuse(
            "rows_mismatch", f"{path}.prompts", f"{len(node.prompts)} stored prompts for {asked} prompts"
        )
    for i, prompt in enumerate(node.prompts):
        if prompt >= held:
            raise errors.refuse(
                "position_out_of_range", f"{path}.prompts[{i}]",
                f"{prompt}: {node.handle!r} holds {held} prompts, 0 to {held - 1}",
                next_step="Stored prompts count from 0, in the order in which they were captured.",
            )  # fmt: skip
    return node.prompts


def _stored_rows(
    node: ops.Stored, facts: HandleFacts, chosen: tuple[int, ...], walk: Walk, path: str
) -> list[tuple[int, ...]]:
    selector = positions.parse(node.at, f"{path}.at")
    if not selector.static or selector.mark is not None:
        raise errors.refuse(
            "bad_position", f"{path}.at", f"{node.at!r}: stored rows are selected with prompt[...]",
            closest="prompt[*]", next_step="Use prompt[...], counted over the stored rows of a prompt.",
        )  # fmt: skip
    by_length: dict[int, tuple[int, ...]] = {}
    for prompt in chosen:
        length = facts.rows_per_prompt[prompt]
        if length not in by_length:
            by_length[length] = tuple(positions.resolve(selector, length, 0, f"{path}.at", prompt).prompt)
            walk.stored_rows += len(by_length[length])
    rows = [by_length[facts.rows_per_prompt[prompt]] for prompt in chosen]
    walk.stored_rows += sum(len(r) for r in rows)
    if walk.stored_rows > MAX_STORED_ROWS:
        raise errors.refuse(
            "too_expensive", path, f"stored rows are named {walk.stored_rows} times; the limit is {MAX_STORED_ROWS}"
        )  # fmt: skip
    if not any(rows):
        raise errors.refuse("touches_nothing", f"{path}.at", f"{node.at!r} selects no stored row")
    return rows


def arrays(node: ops.Sae) -> dict[str, str]:
    """Names of a dictionary's tensors, by field."""
    named = {f: getattr(node, f) for f in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")}
    return {field: name for field, name in named.items() if name is not None}


def sae(node: ops.Sae, walk: Walk, path: str) -> Value:
    enc = _shape(node.w_enc, walk, f"{path}.w_enc")
    if len(enc) != 2:
        raise errors.refuse(
            "width_mismatch", f"{path}.w_enc", f"{node.w_enc!r} has shape {list(enc)}; w_enc is [D, F]"
        )
    d, f = enc
    wanted = {"w_enc": (d, f), "b_enc": (f,), "w_dec": (f, d), "b_dec": (d,), "threshold": (f,)}
    for field, name in arrays(node).items():
        shape = wanted[field]
        given = _shape(name, walk, f"{path}.{field}")
        if given != shape:
            raise errors.refuse(
                "width_mismatch", f"{path}.{field}",
                f"{name!r} has shape {list(given)}; with w_enc {list(enc)}, {field} is {list(shape)}",
                next_step="w_enc is [D, F], b_enc [F], w_dec [F, D], b_dec [D], threshold [F]: transpose if needed.",
            )  # fmt: skip
    _activation(node, f, path)
    return Value("dictionary", d, Label.USER, features=f)


def _activation(node: ops.Sae, features: int, path: str) -> None:
    for field, owner, given in (("k", "topk", node.k), ("threshold", "jumprelu", node.threshold)):
        if given is None and node.activation == owner:
            raise errors.refuse("missing_field", f"{path}.{field}", f"activation {owner!r} needs {field}")
        if given is not None and node.activation != owner:
            raise errors.refuse(
                "bad_value", f"{path}.{field}", f"{field} belongs to activation {owner!r}, not {node.activation!r}"
            )  # fmt: skip
    if node.k is not None and node.k > features:
        raise errors.refuse(
            "bad_value", f"{path}.k", f"k is {node.k}; the dictionary has {features} features"
        )
