"""A policy as a file: read strictly, compared place by place, and every difference judged looser or not.

A server refuses to start with a policy that is looser than the last one in its log unless two people approved it;
this module only says what is looser. It opens no files.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from trocar import errors
from trocar.gate.policy import Airlock, Data, Outputs, People, Policy, Project, Settings, Tiers, TierTerms
from trocar.strict import Strict

UNLIMITED: Final = "unlimited"
"""How a file says that something is counted and not capped."""


def read(text: str) -> Policy:
    """Reads a policy file; a setting that it leaves out has its default.

    Raises:
        ProgramError: `bad_policy`, one refusal for each fault, with the place in the file.
    """
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also a number, or brackets, without an end
        raise errors.refuse("bad_policy", "$", f"the file is not TOML: {e}") from None
    whole = _over(Policy().model_dump(mode="json"), found)
    return from_json(json.dumps(whole, default=str))


def _over(usual: Any, said: Any) -> Any:
    """What a file says over the defaults: what it leaves out stays as it is by default."""
    if isinstance(usual, dict) and isinstance(said, dict):
        return {
            name: _over(usual.get(name), said[name]) if name in said else usual[name]
            for name in {**usual, **said}
        }
    return None if said == UNLIMITED else said


def from_json(text: str) -> Policy:
    """Reads a policy as JSON.

    Raises:
        ProgramError: `bad_policy`, as `read`.
    """
    try:
        return Policy.model_validate_json(text)
    except ValidationError as e:
        faults = [_fault(f) for f in e.errors(include_url=False, include_input=False)]
        raise errors.ProgramError(faults[:20]) from None


def _fault(found: Any) -> errors.Refusal:
    path = ".".join(str(part) for part in found["loc"])
    near = None
    if found["type"] == "extra_forbidden":
        near = errors.closest(str(found["loc"][-1]), _words())
    return errors.refusal("bad_policy", path or "$", str(found["msg"]), closest=near)


def write(policy: Policy) -> str:
    """A policy as a TOML file, every setting written out; `read` gives it back."""
    tables: dict[str, list[str]] = {"": [f"version = {policy.version}"]}
    for path, value in settings(policy):
        table, _, name = path.rpartition(".")
        if table:
            tables.setdefault(table, []).append(f"{name} = {_toml(UNLIMITED if value is None else value)}")
    parts = [
        "\n".join([*([f"[{_header(table)}]"] if table else []), *lines])
        for table, lines in sorted(tables.items())
    ]
    return "\n\n".join(parts) + "\n"


def _header(table: str) -> str:
    """The name of a table; that of a project may have dots, which mean something else in TOML."""
    part, _, name = table.partition(".")
    return f'{part}."{name}"' if part == _PROJECTS and "." in name else table


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def meaning(path: str) -> str:
    """What the setting at a place means: the words of its docstring in `policy`."""
    part, _, name = path.rpartition(".")
    model = Project if part.partition(".")[0] == _PROJECTS else _PARTS[part]
    return _attributes(model.__doc__ or "")[name]


def _attributes(doc: str) -> dict[str, str]:
    """Lines `a, b: words` of a docstring's Attributes, joined over line breaks."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in doc.partition("Attributes:")[2].splitlines():
        match = _ATTRIBUTE.fullmatch(line)
        if match:
            names = [name.strip() for name in match[1].split(",")]
            found |= dict.fromkeys(names, match[2])
        elif names and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


_ATTRIBUTE: Final = re.compile(r" {8}(\w+(?:, \w+)*): (.*)")
_PROJECTS: Final = "projects"
_PARTS: Final[Mapping[str, type[Strict]]] = {
    "": Policy,
    "people": People,
    **{f"people.tiers.{name}": TierTerms for name in Tiers.model_fields},
    "settings": Settings,
    "data": Data,
    "outputs": Outputs,
    "outputs.airlock": Airlock,
}


def _words() -> set[str]:
    """Every name that may stand in a file: of a part, a tier or a setting."""
    places = {name for name, _ in settings(Policy(projects={"x": Project()}))}
    return {word for place in places for word in place.split(".")} - {"x"}


def settings(policy: Policy) -> Iterator[tuple[str, Any]]:
    """Every number and word of a policy by its place, `people.tiers.external.life_ppm` and so on."""
    yield from _leaves("", policy.model_dump(mode="json"))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}" if path else name, inner)
    else:
        yield path, value


@dataclass(frozen=True, slots=True)
class Change:
    """One difference of two policies; `looser` when more may leave than before, or with less said of it."""

    path: str
    was: Any
    now: Any
    looser: bool


_MORE_IS_LOOSER: Final = (
    "life_ppm", "day_ppm", "rank_ppm", "scalar_bits", "vector_bits", "lineage_day_ppm", "lineage_rank_ppm",
    "days", "review_bytes", "most_bytes", "refusals_per_minute",
)  # fmt: skip
_LESS_IS_LOOSER: Final = (
    "tick_ms", "overhead_bits", "first_raw_layer", "least_blocks", "approvers", "open_approvers",
)  # fmt: skip
_ORDER: Final[Mapping[str, tuple[Any, ...]]] = {
    "raw": ("never", "airlock", "direct"),
    "guarded": (True, False),
    "linear_maps": (False, True),
    "own_targets": (False, True),
    "isolation": ("host", "process"),
    "lineage_tier": ("agent", "external", "trusted"),
}


def changes(old: Policy, new: Policy) -> tuple[Change, ...]:
    """What is different, place by place. What is not known to be tighter counts as looser."""
    was, now = dict(settings(old)), dict(settings(new))
    return tuple(
        Change(path, was.get(path), now.get(path), _looser(path, was.get(path), now.get(path)))
        for path in dict.fromkeys((*was, *now))
        if was.get(path) != now.get(path)
    )


def _looser(path: str, was: Any, now: Any) -> bool:
    name = path.rpartition(".")[2]
    if name in _ORDER:
        order = _ORDER[name]
        return was not in order or now not in order or order.index(now) > order.index(was)
    if name in _MORE_IS_LOOSER:  # an absent limit is no limit
        return now is None or (was is not None and now > was)
    if name in _LESS_IS_LOOSER:
        return was is None or now is None or now < was
    return True
