"""A policy as a file: read strictly, compared place by place, and every difference judged looser or not.

A server refuses to start with a policy that is looser than the last one in its log unless two people approved it;
this module only says what is looser. It opens no files.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from trocar import errors
from trocar.gate.policy import Policy


def read(text: str) -> Policy:
    """Reads a policy file.

    Raises:
        ProgramError: `bad_policy`, one refusal for each fault, with the place in the file.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise errors.refuse("bad_policy", "$", f"the file is not TOML: {e}") from None
    return from_json(json.dumps(found, default=str))


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
        near = errors.closest(
            str(found["loc"][-1]), {name.rpartition(".")[2] for name, _ in settings(Policy())}
        )
    return errors.refusal("bad_policy", path or "$", str(found["msg"]), closest=near)


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
