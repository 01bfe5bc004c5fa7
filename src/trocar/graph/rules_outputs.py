"""Type rules of outputs and of control: what may be asked of which values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from trocar import errors, sites
from trocar.graph import cost, ops, rules_arithmetic, rules_values, words
from trocar.graph.scope import Selection, Walk
from trocar.graph.shapes import Value, require_aligned

MAX_RAW_NUMBERS: Final = 1 << 22


def _same_rows(refs: Sequence[str], walk: Walk, path: str) -> list[Value]:
    values = [walk.values[r] for r in refs]
    first = values[0]
    for i, value in enumerate(values[1:], start=1):
        if refs[i] in refs[:i]:
            raise errors.refuse(
                "duplicate_id", f"{path}.of[{i}]", f"{refs[i]!r} is named twice, and would be charged twice"
            )
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
    if node.reduce == "mean":
        rules_arithmetic.require_counted(values[0], node.of[0], f"{path}.of[0]")
        walk.whole = True


def raw(node: ops.Raw, walk: Walk, path: str) -> None:
    values = _same_rows(node.of, walk, path)
    for i, value in enumerate(values):
        if not value.plain:
            raise errors.refuse(
                "wrong_operand", f"{path}.of[{i}]", f"{node.of[i]!r} is not a read of a whole site",
                next_step="Name reads without heads or neurons; numbers made from rows leave as a score.",
            )  # fmt: skip
    numbers = sum(cost.rows_of(v, walk) * v.width for v in values)
    if numbers > MAX_RAW_NUMBERS:
        raise errors.refuse(
            "too_expensive", f"{path}.of", f"{numbers} numbers; one answer holds at most {MAX_RAW_NUMBERS}",
            next_step="Capture the rows and work on the handle.",
        )  # fmt: skip


def lens(node: ops.Lens, walk: Walk, path: str) -> None:
    for i, value in enumerate(_same_rows(node.of, walk, path)):
        if value.form == "pattern":
            raise errors.refuse(
                "wrong_operand", f"{path}.of[{i}]", f"{node.of[i]!r} is an attention pattern: use pattern"
            )
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
    walk.token_ids[node.id] = _tokens(node.tokens, walk, f"{path}.tokens")


def _tokens(
    tokens: words.Tokens | tuple[words.Tokens, ...], walk: Walk, path: str
) -> tuple[tuple[int, ...], ...]:
    """Token ids per prompt, from one list for all or one list each."""
    n_prompts = len(walk.scope.lengths)
    nested = [row for row in tokens if isinstance(row, tuple)]
    if not nested:
        return (tuple(_token(t, walk, f"{path}[{i}]") for i, t in enumerate(tokens)),) * n_prompts
    if len(nested) != n_prompts:
        raise errors.refuse("rows_mismatch", path, f"{len(nested)} lists of tokens for {n_prompts} prompts")
    if len({len(row) for row in nested}) != 1:
        raise errors.refuse("bad_value", path, "every prompt needs the same number of tokens")
    return tuple(
        tuple(_token(t, walk, f"{path}[{i}][{j}]") for j, t in enumerate(row)) for i, row in enumerate(nested)
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
        if value.content == "wide":
            raise errors.refuse(
                "wrong_operand",
                f"{path}.of",
                f"{node.of!r} is {value.kind}; a score needs numbers, such as dot(...), or a probe",
            )
        if node.site is not None:
            raise errors.refuse(
                "bad_value", f"{path}.site", f"site {node.site!r} without a probe means nothing"
            )
        return
    facts = rules_values.artifact(node.probe, walk, f"{path}.probe")
    if not facts.has_probe:
        raise errors.refuse(
            "wrong_handle", f"{path}.probe", f"{node.probe!r} is a direction without a bias; use dot"
        )
    if node.site is None:
        raise errors.refuse("missing_field", f"{path}.site", "a probe holds weights per site: name the site")
    if value.form == "pattern":
        raise errors.refuse(
            "wrong_operand", f"{path}.of", f"{node.of!r} is an attention pattern: use pattern"
        )
    width = rules_values.held_width(facts, node.site, f"{path}.site")
    if value.kind != "rows" or value.width != width:
        raise errors.refuse(
            "width_mismatch", f"{path}.of", f"{node.of!r} is not rows of the probe's width at {node.site}"
        )


_METRIC_FIELDS = {"logit_diff": ("tokens",), "cross_entropy": (), "kl": ("to",)}


def metric(node: ops.Metric, walk: Walk, path: str) -> None:
    selection = walk.select(node.at, f"{path}.at")
    if selection.has_gen:
        raise errors.refuse(
            "bad_position", f"{path}.at", f"{node.at!r}: a metric is a mean over prompt tokens",
            closest="prompt[-1]", next_step="Use prompt[...]; score and logprobs take generated tokens.",
        )  # fmt: skip
    for field in ("tokens", "to"):
        needed, given = field in _METRIC_FIELDS[node.metric], getattr(node, field) is not None
        if needed and not given:
            raise errors.refuse("missing_field", f"{path}.{field}", f"{node.metric} needs {field}")
        if given and not needed:
            raise errors.refuse("bad_value", f"{path}.{field}", f"{node.metric} takes no {field}")
    if node.tokens is not None:
        _pair(node, node.tokens, walk, f"{path}.tokens")
    elif node.to is not None:
        _distribution(node.to, selection, walk, f"{path}.to")
    else:
        _require_next_token(node, selection, walk, f"{path}.at")


def _pair(node: ops.Metric, tokens: words.Tokens | tuple[words.Tokens, ...], walk: Walk, path: str) -> None:
    ids = _tokens(tokens, walk, path)
    if len(ids[0]) != 2:
        raise errors.refuse("bad_value", path, f"logit_diff takes a pair of tokens, not {len(ids[0])}")
    walk.token_ids[node.id] = ids


def _distribution(to: str, selection: Selection, walk: Walk, path: str) -> None:
    value = walk.values[to]
    if value.form not in ("read", "stored") or value.sites != (sites.Site("final_norm"),):
        raise errors.refuse(
            "wrong_operand", path, f"{to!r} is not rows of final_norm as they were read or stored",
            next_step="Capture final_norm in a first run and name its rows here.",
        )  # fmt: skip
    require_aligned(value, selection.selector.text, selection.counts, selection.has_gen, path)


def _require_next_token(node: ops.Metric, selection: Selection, walk: Walk, path: str) -> None:
    for i, (rows, length) in enumerate(zip(selection.rows, walk.scope.lengths, strict=True)):
        if rows.prompt[-1] == length - 1:
            raise errors.refuse(
                "position_out_of_range", path,
                f"{node.at!r}: the last token of prompt {i} has no next token in the prompt to be predicted",
                closest="prompt[:-1]", next_step="Leave the last token out.",
            )  # fmt: skip


def pattern(node: ops.Pattern, walk: Walk, path: str) -> None:
    if walk.values[node.of].form != "pattern":
        raise errors.refuse(
            "wrong_operand", f"{path}.of", f"{node.of!r} is not a read of attn_probs",
            next_step="Read attn_probs with its keys, and name that read.",
        )  # fmt: skip


def text(_node: ops.Text, walk: Walk, path: str) -> None:
    if walk.scope.generation.max_new_tokens == 0:
        raise errors.refuse(
            "touches_nothing",
            path,
            "text is returned but max_new_tokens is 0",
            next_step="Set generation.max_new_tokens.",
        )


def stop_after(node: ops.StopAfter, walk: Walk, path: str) -> None:
    model = walk.scope.model
    if node.layer >= model.n_layers:
        raise errors.refuse(
            "layer_out_of_range", f"{path}.layer",
            f"{node.layer}: {model.name} has {model.n_layers} layers, 0 to {model.n_layers - 1}",
        )  # fmt: skip
    if walk.stop is not None:
        raise errors.refuse(
            "after_stop", path, f"the program stops after layer {walk.stop} already",
            next_step="Keep one stop_after.",
        )  # fmt: skip
    walk.stop = node.layer
