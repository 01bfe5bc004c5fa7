"""A cache that stays on the server: `cache["resid_post", 5]` is a handle, and a value in a hook of a later run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from trocar import aliases, errors, sites
from trocar.fronts import words
from trocar.fronts.indexing import Dim, Window
from trocar.fronts.saved import Rows
from trocar.fronts.values import HEADS, NO_ROWS
from trocar.graph.builder import selector
from trocar.graph.facts import ModelFacts

_BELOW: Final = {
    **dict.fromkeys((*HEADS, "pattern"), "attn."),
    "post": "mlp.",
    "pre": "mlp.",
    "mlp_post": "mlp.",
}
_ELSEWHERE: Final = {
    "decompose_resid": "Capture the parts (attn_out, mlp_out) and ask t.lens or a dot of each in one native trace.",
    "accumulated_resid": "In a native trace, t.lens(t.resid_post[:][-1]) is the lens over layers.",
    "logit_attrs": "In a native trace, (t.attn_out[5][-1] @ direction) is a number that can be scored.",
    "apply_ln_to_stack": "t.lens applies the model's own last norm.",
    "stack_activation": "Each place has a handle of its own.",
    "stack_head_results": "Per-head outputs are z, before the output projection.",
}


def act_name(name: str, layer: int | None = None) -> str:
    """The hook of a short name: `act_name("resid_post", 5)`."""
    if layer is None or "hook_" in name:
        return name
    return f"blocks[{layer}].{_BELOW.get(name, '')}hook_{name}"


def hook_names(facts: ModelFacts) -> dict[str, sites.Site]:
    """Hooks of the model whose rows can be stored or edited, in the order of the forward pass."""
    layered = [n for n in facts.sites if sites.SITES[n].layered and n not in NO_ROWS]
    places = [sites.Site(n) for n in facts.sites if not sites.SITES[n].layered and n not in NO_ROWS]
    places += [sites.Site(n, layer) for n in layered for layer in range(facts.n_layers)]
    found: dict[str, sites.Site] = {}
    for place in sorted(places, key=lambda p: sites.order(p, facts.n_layers)):
        spelled = [s for s in aliases.spellings(place, facts) if "hook_" in s]
        if spelled:  # the classic name before the bridge's
            found[min(spelled, key=lambda s: s.endswith((".hook_in", ".hook_out")))] = place
    return found


def chosen(names_filter: Any, facts: ModelFacts, argument: str = "names_filter") -> dict[str, sites.Site]:
    """The hooks that a filter means: a name, several, a function of the name, or None for all of them."""
    known = hook_names(facts)
    if names_filter is None:
        return known
    if callable(names_filter):
        accepts: Callable[[str], Any] = names_filter
        found = {name: site for name, site in known.items() if accepts(name)}
    else:
        texts = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        spelled = {site: name for name, site in known.items()}
        resolved = [aliases.resolve(text, facts, argument) for text in texts]
        found = {spelled.get(site, str(site)): site for site in resolved}
    if not found:
        step = f"The names of this model: {', '.join(list(known)[:4])}, ... (patterns and logits are none of them)."
        raise words.refuse(argument, "the filter accepts no hook whose rows can be stored or edited", step)
    return found


class Entry(Rows):
    """Stored rows of one hook: `entry[:, -1]` is a value in a hook, `entry.fit(...)` a probe."""

    def __init__(self, site: str, prompts: int) -> None:
        super().__init__(site)
        self._prompts = prompts

    def __getitem__(self, index: Any) -> Any:
        name = self.site.partition(".")[0]
        last: tuple[Dim, ...] = ("head", "column") if name in HEADS else ("column",)
        window = Window(("batch", "token", *last)).at(index, self._prompts)
        if window.picked is not None:
            step = "Take whole rows: entry[:, position]. Heads are chosen where they are read or written."
            raise words.refuse("index", f"some columns of {self!r}", step)
        return self.rows(at=selector(window.tokens))


class Cache(Mapping[Any, Entry]):
    """Entries by hook name, `cache["blocks.5.hook_resid_post"]`, or by short name and layer."""

    def __init__(self, facts: ModelFacts, entries: dict[str, Entry]) -> None:
        self._facts = facts
        self._entries = entries

    def __getitem__(self, key: Any) -> Entry:
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) > 2 or not isinstance(parts[0], str):
            step = 'Write cache["resid_post", 5], or the hook\'s name.'
            raise words.refuse("cache", f"{key!r} is no key", step)
        place = aliases.resolve(act_name(*parts), self._facts, "cache")
        if place.name in NO_ROWS:
            raise words.refuse("cache", f"{place} is never stored", NO_ROWS[place.name])
        site = str(place)
        for entry in self._entries.values():
            if entry.site == site:
                return entry
        near = errors.closest(act_name(*parts), self._entries)
        step = "Name it in names_filter."
        raise errors.refuse("bad_argument", "cache", f"{site} was not cached", closest=near, next_step=step)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except errors.TrocarError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> Collection[str]:  # type: ignore[override]
        return self._entries.keys()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(name, "a cache", step=_ELSEWHERE.get(name))

    def __repr__(self) -> str:
        return f"<Cache of {len(self)} places, on the server>"
