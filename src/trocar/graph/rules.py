"""Type rules: what each op needs and what it gives, one small function per op.

A rule sees its node and a `Walk` (the static scope plus the values of earlier nodes) and returns the node's
`Value`, None for edits and outputs. It raises `ProgramError` with a path. Rules never look at data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trocar import errors, sites
from trocar.graph import ops
from trocar.graph.facts import HandleFacts
from trocar.graph.labels import Label
from trocar.graph.scope import Selection, Walk
from trocar.graph.shapes import Value, combine, require_aligned


def read(node: ops.Read, walk: Walk, path: str) -> Value:
    site = walk.site(node.site, f"{path}.site")
    selection = walk.select(node.at, f"{path}.at")
    width = walk.scope.model.width(site)
    return Value(
        "rows",
        width,
        Label.ACT,
        selection.counts,
        selection.selector.text,
        selection.has_gen,
        walk.order(site),
        (site,),
        plain=True,
    )


def tensor(node: ops.Tensor, walk: Walk, path: str) -> Value:
    widths = walk.scope.tensors
    if node.name not in widths:
        near = errors.closest(node.name, widths)
        raise errors.refuse(
            "unknown_tensor", f"{path}.name", f"the request carries no tensor {node.name!r}", closest=near
        )
    return Value("vector", widths[node.name], Label.USER)


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


def _held_width(facts: HandleFacts, site: str, path: str) -> int:
    if site not in facts.widths:
        near = errors.closest(site, facts.widths)
        raise errors.refuse(
            "wrong_handle", path, f"{facts.handle!r} holds nothing for {site!r}", closest=near
        )
    return facts.widths[site]


def vector(node: ops.Vector, walk: Walk, path: str) -> Value:
    facts = _handle(node.handle, "artifact", walk, f"{path}.handle")
    if node.part == "weights" and not facts.has_probe:
        raise errors.refuse("wrong_handle", f"{path}.part", f"{node.handle!r} is a direction without weights")
    return Value("vector", _held_width(facts, node.site, f"{path}.site"), Label.ACT)


def stored(node: ops.Stored, walk: Walk, path: str) -> Value:
    facts = _handle(node.handle, "activations", walk, f"{path}.handle")
    width = _held_width(facts, node.site, f"{path}.site")
    if len(facts.rows_per_prompt) != len(walk.scope.lengths):
        held, asked = len(facts.rows_per_prompt), len(walk.scope.lengths)
        raise errors.refuse(
            "rows_mismatch",
            f"{path}.handle",
            f"{node.handle!r} holds rows of {held} prompts, this request has {asked}",
        )
    return Value(
        "rows", width, Label.ACT, facts.rows_per_prompt, sites=(sites.parse(node.site, f"{path}.site"),)
    )


def add(node: ops.Add | ops.Sub, walk: Walk, path: str) -> Value:
    return combine(walk.values[node.a], walk.values[node.b], path)


def scale(node: ops.Scale, walk: Walk, _path: str) -> Value:
    return replace(walk.values[node.of], plain=False)


def dot(node: ops.Dot, walk: Walk, path: str) -> Value:
    value = combine(walk.values[node.a], walk.values[node.b], path)
    if value.kind != "rows":
        raise errors.refuse(
            "wrong_operand", f"{path}.a", f"dot needs rows on one side, not {value.kind} twice"
        )
    return replace(value, kind="scalars", width=1)


def mean(node: ops.Mean, walk: Walk, path: str) -> Value:
    value = walk.values[node.of]
    if value.gen:
        raise errors.refuse(
            "wrong_operand", f"{path}.of",
            f"{node.of!r} has rows of generated tokens; their number is not known in advance",
            next_step="Take the mean over prompt[...] rows, or capture the rows and fit on the server.",
        )  # fmt: skip
    if 0 in value.counts:
        raise errors.refuse(
            "rows_mismatch", f"{path}.of", f"{node.of!r} has no row for prompt {value.counts.index(0)}",
            next_step="Leave that prompt out, or capture rows of its prompt tokens.",
        )  # fmt: skip
    return replace(value, kind="per_prompt", counts=(1,) * len(value.counts), at=None, plain=False)


def _edit_target(
    node: ops.EditAdd | ops.EditSet | ops.EditScale | ops.EditProjectOut, walk: Walk, path: str
) -> tuple[sites.Site, Selection]:
    site = walk.site(node.site, f"{path}.site")
    if not site.spec.editable:
        raise errors.refuse("site_not_editable", f"{path}.site", f"{node.site!r} can be read but not written")
    selection = walk.select(node.at, f"{path}.at")
    first_gen = selection.rows[0].gen.start
    last_is_fed = walk.reads_gen
    if not sum(selection.counts) and first_gen >= walk.scope.generation.max_new_tokens - (not last_is_fed):
        raise errors.refuse(
            "touches_nothing", f"{path}.at",
            f"{node.at!r}: the last generated token is never fed back, so with max_new_tokens="
            f"{walk.scope.generation.max_new_tokens} the edit reaches no row",
        )  # fmt: skip
    return site, selection


def edit_with_value(node: ops.EditAdd | ops.EditSet | ops.EditProjectOut, walk: Walk, path: str) -> None:
    site, selection = _edit_target(node, walk, path)
    if node.value == ops.ZERO:
        return
    value = walk.values[node.value]
    width = walk.scope.model.width(site)
    if value.width != width:
        raise errors.refuse(
            "width_mismatch",
            f"{path}.value",
            f"{node.value!r} has width {value.width}, {node.site} has width {width}",
        )
    if value.kind == "rows":
        require_aligned(value, selection.selector.text, selection.counts, selection.has_gen, f"{path}.value")
    _require_earlier(node, value, site, selection, walk, path)


def _require_earlier(
    node: ops.EditAdd | ops.EditSet | ops.EditProjectOut,
    value: Value,
    site: sites.Site,
    selection: Selection,
    walk: Walk,
    path: str,
) -> None:
    only_later_tokens = not value.gen and selection.selector.prompt is None
    if value.ready <= walk.order(site) or only_later_tokens:
        return
    names = ", ".join(str(s) for s in value.sites)
    raise errors.refuse(
        "edit_after_layer",
        f"{path}.value",
        f"{node.value!r} is read at {names}, which is computed after {node.site}",
    )


def edit_scale(node: ops.EditScale, walk: Walk, path: str) -> None:
    _edit_target(node, walk, path)


def _same_rows(refs: Sequence[str], walk: Walk, path: str) -> list[Value]:
    values = [walk.values[r] for r in refs]
    first = values[0]
    for i, value in enumerate(values[1:], start=1):
        if (value.kind, value.at, value.counts) != (first.kind, first.at, first.counts):
            raise errors.refuse(
                "rows_mismatch", f"{path}.of[{i}]", f"{refs[i]!r} and {refs[0]!r} select different tokens"
            )
    return values


def capture(node: ops.Capture, walk: Walk, path: str) -> None:
    values = _same_rows(node.of, walk, path)
    seen: set[sites.Site] = set()
    for i, value in enumerate(values):
        if not value.plain:
            raise errors.refuse(
                "wrong_operand", f"{path}.of[{i}]",
                f"{node.of[i]!r} is not a read: stored under its site's name, it would pass for the site's rows",
                next_step="Capture the reads, and do the arithmetic on the stored rows.",
            )  # fmt: skip
        if value.sites[0] in seen:
            raise errors.refuse(
                "wrong_operand", f"{path}.of[{i}]", f"{value.sites[0]} is captured twice by one node"
            )
        seen.add(value.sites[0])


def lens(node: ops.Lens, walk: Walk, path: str) -> None:
    for i, value in enumerate(_same_rows(node.of, walk, path)):
        if value.width != walk.scope.model.d_model:
            raise errors.refuse(
                "width_mismatch",
                f"{path}.of[{i}]",
                f"the lens reads rows of width {walk.scope.model.d_model}, {node.of[i]!r} has {value.width}",
            )
        normed = [s.name == "final_norm" for s in value.sites]
        if any(normed) and not all(normed):
            raise errors.refuse(
                "wrong_operand",
                f"{path}.of[{i}]",
                f"{node.of[i]!r} mixes rows before and after the final norm",
            )


def logprobs(node: ops.Logprobs, walk: Walk, path: str) -> None:
    walk.select(node.at, f"{path}.at")
    n_prompts = len(walk.scope.lengths)
    where = f"{path}.tokens"
    nested = [row for row in node.tokens if isinstance(row, tuple)]
    if not nested:
        shared = tuple(_token(t, walk, f"{where}[{i}]") for i, t in enumerate(node.tokens))
        walk.token_ids[node.id] = (shared,) * n_prompts
        return
    if len(nested) != n_prompts:
        raise errors.refuse("rows_mismatch", where, f"{len(nested)} lists of tokens for {n_prompts} prompts")
    if len({len(row) for row in nested}) != 1:
        raise errors.refuse("bad_value", where, "every prompt needs the same number of tokens")
    walk.token_ids[node.id] = tuple(
        tuple(_token(t, walk, f"{where}[{i}][{j}]") for j, t in enumerate(row))
        for i, row in enumerate(nested)
    )


def _token(token: object, walk: Walk, path: str) -> int:
    if isinstance(token, int):
        if not 0 <= token < walk.scope.model.vocab_size:
            raise errors.refuse(
                "unknown_token", path, f"token id {token} is outside 0..{walk.scope.model.vocab_size - 1}"
            )
        return token
    text = str(token)
    if text not in walk.encoded:
        walk.encoded[text] = tuple(walk.scope.encode(text))
    ids = walk.encoded[text]
    if len(ids) != 1:
        raise errors.refuse("not_one_token", path, f"{token!r} is {len(ids)} tokens: {list(ids)[:8]}")
    return ids[0]


def score(node: ops.Score, walk: Walk, path: str) -> None:
    value = walk.values[node.of]
    if node.probe is None:
        if value.kind != "scalars":
            raise errors.refuse(
                "wrong_operand",
                f"{path}.of",
                f"{node.of!r} is {value.kind}; a score needs dot(...) or a probe",
            )
        if node.site is not None:
            raise errors.refuse(
                "bad_value", f"{path}.site", f"site {node.site!r} without a probe means nothing"
            )
        return
    facts = _handle(node.probe, "artifact", walk, f"{path}.probe")
    if not facts.has_probe:
        raise errors.refuse(
            "wrong_handle", f"{path}.probe", f"{node.probe!r} is a direction without a bias; use dot"
        )
    if node.site is None:
        raise errors.refuse("missing_field", f"{path}.site", "a probe holds weights per site: name the site")
    if value.kind != "rows" or value.width != _held_width(facts, node.site, f"{path}.site"):
        raise errors.refuse(
            "width_mismatch", f"{path}.of", f"{node.of!r} is not rows of the probe's width at {node.site}"
        )


def text(_node: ops.Text, walk: Walk, path: str) -> None:
    if walk.scope.generation.max_new_tokens == 0:
        raise errors.refuse(
            "touches_nothing",
            path,
            "text is returned but max_new_tokens is 0",
            next_step="Set generation.max_new_tokens.",
        )
