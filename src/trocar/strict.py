"""The base of every model that crosses the network, and a JSON reader stricter than the standard one.

`Strict` models are frozen, refuse unknown fields, never convert types ("2" is not 2, True is not 1) and
refuse NaN and infinities. `read_json` refuses duplicate keys, NaN and infinity literals, and nesting deeper
than `MAX_DEPTH` before any model sees the data. `parse` turns pydantic's findings into our refusals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from reprlib import Repr
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from trocar import errors

MAX_DEPTH: Final = 32
MAX_DIGITS: Final = 400
MAX_KEYS: Final = 64
MAX_FINDINGS: Final = 20
SHOWN: Final = 80
# The closing quote is optional: a string that never ends is read once, not again from each quote inside it.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Frozen, exact, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_json(raw: bytes, longest: Mapping[str, int] | None = None, most_keys: int = MAX_KEYS) -> Any:
    """Decodes one JSON document in time linear in its length.

    Args:
        raw: UTF-8 JSON.
        longest: most items of the lists under these keys.
        most_keys: most keys of one object.

    Raises:
        BadRequest: `bad_json`, `duplicate_key`, `not_finite` or `too_large` (nested too deeply, or an object
            with too many keys).
        ProgramError: `bad_value` for an integer of more than `MAX_DIGITS` digits, `too_many_nodes`.
    """
    _check_depth(raw)
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=partial(_object, longest or {}, most_keys),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short_int,
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise errors.refuse("bad_json", "$", f"the body is not UTF-8 JSON: {e}") from None


def _check_depth(raw: bytes) -> None:
    """Counts brackets outside strings, so that a bomb is refused before the recursive parser runs."""
    depth = 0
    for match in _TOKEN.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise errors.refuse("too_large", "$", f"the JSON is nested deeper than {MAX_DEPTH} levels")


def _object(longest: Mapping[str, int], most: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > most:
        raise errors.refuse("too_large", "$", f"an object of {len(pairs)} keys; the limit is {most}")
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            name = key[:SHOWN]
            raise errors.refuse("duplicate_key", name, f"the key {name!r} appears twice in one object")
        if isinstance(value, list) and len(value) > longest.get(key, len(value)):
            code = "too_many_nodes" if key == "nodes" else "too_large"
            raise errors.refuse(code, key, f"{len(value)} {key}; one request takes at most {longest[key]}")
        out[key] = value
    return out


def _no_constant(word: str) -> float:
    raise errors.refuse("not_finite", "$", f"the JSON contains {word}, which is not a number")


def _finite(word: str) -> float:
    value = float(word)
    if value in (float("inf"), float("-inf")):
        raise errors.refuse("not_finite", "$", f"the number {word[:40]} overflows a double")
    return value


def _short_int(word: str) -> int:
    if len(word) > MAX_DIGITS:
        raise errors.refuse("bad_value", "$", f"an integer of {len(word)} digits is out of range")
    return int(word)


def parse(model: type[M], raw: bytes, *, options: Mapping[str, Sequence[str]] | None = None) -> M:
    """Decodes one JSON document into a strict model.

    Args:
        model: a `Strict` subclass.
        raw: UTF-8 JSON.
        options: legal words by field name, for the closest match; `"*"` holds the field names themselves.

    Raises:
        BadRequest: what `read_json` raises.
        ProgramError: one refusal per finding, each with its JSON path.
    """
    data = read_json(raw, _longest(model))
    try:
        return model.model_validate_json(raw)
    except ValidationError as e:
        found = e.errors(include_url=False, include_input=False)
        if found[0]["type"] == "json_invalid":  # a lone surrogate: legal for the first reader only
            raise errors.refuse("bad_json", "$", f"the body is not UTF-8 JSON: {found[0]['msg']}") from None
        raise errors.ProgramError(_refusals(found, data, options or {})) from None


def make(model: type[M], /, **fields: Any) -> M:
    """Builds a strict model from Python values, with our refusals instead of pydantic's.

    Raises:
        ProgramError: as `parse`.
    """
    try:
        return model(**fields)
    except ValidationError as e:
        raise errors.ProgramError(
            _refusals(e.errors(include_url=False, include_input=False), fields, {})
        ) from None


@cache
def _longest(model: type[BaseModel]) -> dict[str, int]:
    """Most items of each list field of a model and of the models inside it, by field name."""
    whole = schema(model)
    fields = [
        pair for part in (whole, *whole.get("$defs", {}).values()) for pair in part.get("properties", {}).items()
    ]  # fmt: skip
    return {name: field["maxItems"] for name, field in fields if "maxItems" in field}


_KIND: Final = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "finite_number": "not_finite",
    "union_tag_invalid": "unknown_op",
    "union_tag_not_found": "missing_field",
}
_KIND_AT: Final = {
    ("too_long", "nodes"): "too_many_nodes",
    ("too_short", "prompts"): "empty_prompt",
    ("too_short", "nodes"): "nothing_returned",
}


def _refusals(found: Sequence[Any], data: Any, options: Mapping[str, Sequence[str]]) -> list[errors.Refusal]:
    """One refusal per place: branches of a union agree on a place, and an inner finding explains an outer."""
    places: dict[str, list[Any]] = {}
    values: dict[str, Any] = {}
    for item in found[: 10 * MAX_FINDINGS]:
        path, values[path] = _place(item, data)
        places.setdefault(path, []).append(item)
    inner = [path for path in places if not any(_inside(other, path) for other in places)]
    return [_translate(path, places[path], values[path], options) for path in inner[:MAX_FINDINGS]]


def _inside(path: str, outer: str) -> bool:
    return path.startswith((f"{outer}.", f"{outer}["))


def _place(item: Any, data: Any) -> tuple[str, Any]:
    """JSON path of a finding, and the value there; a union's branch is in `loc` but not in the path."""
    out, here = "", data
    for part in item["loc"]:
        if isinstance(part, int):
            out, here = f"{out}[{part}]", here[part]
        elif isinstance(here, dict) and part in here:
            out, here = _field(out, part), here[part]
    if item["type"] == "missing":
        return _field(out, item["loc"][-1]), None
    if item["type"].startswith("union_tag"):
        return _field(out, "op"), None
    return out or "$", here


def _field(path: str, name: str) -> str:
    return f"{path}.{name[:SHOWN]}" if path else name[:SHOWN]


def _translate(
    path: str, items: Sequence[Any], value: Any, options: Mapping[str, Sequence[str]]
) -> errors.Refusal:
    item = items[0]
    name = path.rpartition(".")[2]
    code = _KIND_AT.get((item["type"], name)) or _KIND.get(item["type"], "bad_value")
    if item["type"] == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])[:SHOWN]
        return errors.refusal(
            code, path, f"{tag!r} is not an op", closest=errors.closest(tag, options.get("op", ()))
        )
    if code == "unknown_field":
        near = errors.closest(name, options.get("*", ()))
        return errors.refusal(code, path, f"{name!r} is not a field here", closest=near)
    if code == "missing_field":
        return errors.refusal(code, path, f"the field {name!r} is required")
    wanted = ", or ".join(dict.fromkeys(i["msg"] for i in items))
    return errors.refusal(code, path, f"{wanted} (got {_shown(value)})")


def _shown(value: Any) -> str:
    """A short `repr`, in time that does not depend on the size of the value."""
    short = Repr()
    short.maxstring = short.maxother = SHOWN
    return short.repr(value)[:SHOWN]


def schema(model: type[BaseModel] | Any) -> dict[str, Any]:
    """JSON Schema of a model or of an annotated union."""
    return TypeAdapter(model).json_schema()
