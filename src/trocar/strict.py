"""The base of every model that crosses the network, and the JSON reader that is stricter than the standard one.

`Strict` models are frozen, refuse unknown fields, never convert types ("2" is not 2, True is not 1) and
refuse NaN and infinities. `read_json` refuses duplicate keys, NaN and infinity literals, and nesting deeper
than `MAX_DEPTH` before any model sees the data. `parse` turns pydantic's findings into our refusals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from trocar import errors

MAX_DEPTH: Final = 32
MAX_DIGITS: Final = 400
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET: Final = re.compile(rb"[\[\]{}]")
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Frozen, exact, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_json(raw: bytes) -> Any:
    """Decodes one JSON document.

    Raises:
        BadRequest: `bad_json`, `duplicate_key`, `not_finite` or `too_large` (nested too deeply).
    """
    _check_depth(raw)
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short_int,
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise errors.refuse("bad_json", "$", f"the body is not UTF-8 JSON: {e}") from None


def _check_depth(raw: bytes) -> None:
    """Counts brackets outside strings, so that a bomb is refused before the recursive parser runs."""
    depth = 0
    for match in _BRACKET.finditer(_STRING.sub(b"", raw)):
        depth += 1 if match[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise errors.refuse("too_large", "$", f"the JSON is nested deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise errors.refuse("duplicate_key", twice, f"the key {twice!r} appears twice in one object")
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
    read_json(raw)
    try:
        return model.model_validate_json(raw)
    except ValidationError as e:
        items = [item for item in e.errors()[:20] if not _consequence(item)]
        raise errors.ProgramError([_translate(item, options or {}) for item in items]) from None


_KIND: Final = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "finite_number": "not_finite",
    "union_tag_invalid": "unknown_op",
    "union_tag_not_found": "missing_field",
}


def make(model: type[M], /, **fields: Any) -> M:
    """Builds a strict model from Python values, with our refusals instead of pydantic's.

    Raises:
        ProgramError: as `parse`.
    """
    try:
        return model(**fields)
    except ValidationError as e:
        raise errors.ProgramError([_translate(item, {}) for item in e.errors()[:20]]) from None


def _consequence(item: Any) -> bool:
    """Whether a finding only repeats one inside it: a list is not too short because its items were refused."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _translate(item: Any, options: Mapping[str, Sequence[str]]) -> errors.Refusal:
    code = _KIND.get(item["type"], "bad_value")
    path = _path(item["loc"], options.get("op", ()))
    name = str(item["loc"][-1]) if item["loc"] else "$"
    if code == "unknown_op":
        tag = str(item["ctx"]["tag"])
        return errors.refusal(
            code, f"{path}.op", f"{tag!r} is not an op", closest=errors.closest(tag, options.get("op", ()))
        )
    if code == "unknown_field":
        near = errors.closest(name, options.get("*", ()))
        return errors.refusal(code, path, f"{name!r} is not a field here", closest=near)
    if code == "missing_field":
        return errors.refusal(code, path, f"the field {name!r} is required")
    shown = repr(item.get("input"))
    return errors.refusal(code, path, f"{item['msg']} (got {shown[:80]})")


def _path(loc: tuple[int | str, ...], tags: Sequence[str]) -> str:
    """JSON path of a finding; pydantic puts a union's tag after the index, which is no part of the path."""
    out, after_index = "", False
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif not (after_index and part in tags):
            out += f".{part}" if out else part
        after_index = isinstance(part, int)
    return out or "$"


def schema(model: type[BaseModel] | Any) -> dict[str, Any]:
    """JSON Schema of a model or of an annotated union."""
    return TypeAdapter(model).json_schema()
