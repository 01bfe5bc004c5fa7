"""Parts of a site's rows: heads, neurons and keys, resolved to columns. No op lives here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from trocar import errors
from trocar.graph.facts import ModelFacts
from trocar.graph.scope import Selection, Walk
from trocar.sites import Site

MAX_COLUMNS: Final = 1 << 20
PATTERN: Final = "attn_probs"
QUERY_HEADED: Final = ("q", "z", PATTERN)
KEY_HEADED: Final = ("k", "v")


class Parted(Protocol):
    """A read or an edit that may name heads or neurons."""

    @property
    def id(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def heads(self) -> tuple[int, ...] | None: ...
    @property
    def neurons(self) -> tuple[int, ...] | None: ...


def columns(node: Parted, site: Site, walk: Walk, path: str) -> tuple[int, ...] | None:
    """Columns of the heads or neurons that a node names, noted in the walk; None when it names none.

    Raises:
        ProgramError: `bad_value` for an index that the model does not have, or twice, or where the site has
            no heads or neurons; `too_expensive`.
    """
    model = walk.scope.model
    if node.heads is not None:
        chosen = heads(node.heads, site, model, f"{path}.heads")
    if node.neurons is not None:
        if site.name != "mlp_act":
            raise _not_here("neurons", site, f"{path}.neurons", "mlp_act")
        chosen = _indices(node.neurons, model.d_mlp, "neurons", f"{path}.neurons")
    elif node.heads is not None:
        d = model.d_head
        chosen = tuple(c for h in chosen for c in range(h * d, (h + 1) * d))
    else:
        return None
    walk.columns[node.id] = chosen
    walk.n_columns += len(chosen)
    if walk.n_columns > MAX_COLUMNS:
        raise errors.refuse(
            "too_expensive", path, f"the program names more than {MAX_COLUMNS} columns of heads and neurons",
            next_step="Leave heads and neurons out where all of them are meant, or split the program.",
        )  # fmt: skip
    return chosen


def heads(given: Sequence[int], site: Site, model: ModelFacts, path: str) -> tuple[int, ...]:
    """The heads named at a site.

    Raises:
        ProgramError: `bad_value`.
    """
    if site.name not in QUERY_HEADED + KEY_HEADED:
        raise _not_here("heads", site, path, "z")
    count = model.n_kv_heads if site.name in KEY_HEADED else model.n_heads
    return _indices(given, count, "key/value heads" if site.name in KEY_HEADED else "heads", path)


def _not_here(what: str, site: Site, path: str, near: str) -> errors.TrocarError:
    where = "q, k, v, z and attn_probs" if what == "heads" else "mlp_act"
    layer = site.layer or 0
    return errors.refuse(
        "bad_value", path, f"{what} exist at {where}, not at {site}",
        closest=f"{near}.{layer}", next_step=f"Leave {what} out, or name a site that has {what}.",
    )  # fmt: skip


def _indices(given: Sequence[int], count: int, what: str, path: str) -> tuple[int, ...]:
    seen: set[int] = set()
    for i, index in enumerate(given):
        if index >= count:
            raise errors.refuse(
                "bad_value", f"{path}[{i}]", f"{index}: the model has {count} {what}, 0 to {count - 1}"
            )
        if index in seen:
            raise errors.refuse("bad_value", f"{path}[{i}]", f"{index} is named twice")
        seen.add(index)
    return tuple(given)


def keys(text: str, walk: Walk, path: str) -> Selection:
    """The prompt tokens that are attended to.

    Raises:
        ProgramError: `bad_position` for generated tokens.
    """
    selection = walk.select(text, path)
    if selection.has_gen:
        raise errors.refuse(
            "bad_position", path, f"{text!r}: keys are prompt tokens", closest="prompt[*]",
            next_step="Select keys with prompt[...].",
        )  # fmt: skip
    return selection


def key_count(selection: Selection, path: str) -> int:
    """How many keys every prompt has.

    Raises:
        ProgramError: `rows_mismatch` when it is not the same number.
    """
    counts = selection.counts
    other = next((i for i, n in enumerate(counts) if n != counts[0]), None)
    if other is not None:
        raise errors.refuse(
            "rows_mismatch", path,
            f"{selection.selector.text!r} selects {counts[0]} keys in prompt 0 and {counts[other]} in prompt {other}",
            next_step="Select equally many keys in every prompt, or send the prompts one at a time.",
        )  # fmt: skip
    return counts[0]
