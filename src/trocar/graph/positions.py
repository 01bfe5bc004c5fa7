"""Position selectors: which tokens of each prompt, and of what is generated, a node touches.

    prompt[-1]   prompt[3]   prompt[3:7]   prompt[:-1]   prompt[1,4,-1]   prompt[*]
    span("the city of X")    span("the", 2)    role("assistant")    mask("subject")    span("Paris")[-1]
    gen[*]       gen[0]      gen[0:32]                              all  (= prompt[*] and gen[*])

`prompt` indices count within one prompt, negative ones from its end, and are resolved before any batching
or padding. `span`, `role` and `mask` look at the `Marks` of that prompt alone, and an index after them counts
within the rows they select. `gen[j]` is the row of the j-th generated token when it is fed back. A bound
outside the prompt is refused, never clipped. This module knows lengths and marks, not tokens.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from trocar import errors

Phase = Literal["prompt", "gen"]
MarkKind = Literal["span", "role", "mask"]
MAX_TEXT: Final = 200
_INSIDE: Final = (
    r"(?P<star>\*)|(?P<list>-?[0-9]{1,7}(?:,-?[0-9]{1,7})*)|(?P<a>-?[0-9]{1,7})?:(?P<b>-?[0-9]{1,7})?"
)
_FORM: Final = re.compile(rf"(?P<what>prompt|gen)\[(?:{_INSIDE})\]")
_MARK: Final = re.compile(
    r'(?P<what>span|role|mask)\((?P<text>"(?:[^"\\]|\\.)*")(?:, ?(?P<nth>[0-9]{1,3}))?\)'
    rf"(?:\[(?:{_INSIDE})\])?",
    re.DOTALL,
)
_CALL: Final = re.compile(r"(span|role|mask)\(\s*['\"]?([^'\"()]{1,60})['\"]?\s*\)?")
EMPTY: Final = range(0)


@dataclass(frozen=True, slots=True)
class Span:
    """An index (`stop` is None and `single`), a slice, or everything."""

    start: int | None
    stop: int | None
    single: bool = False

    def __str__(self) -> str:
        if self.single or self == EVERY:
            return "*" if self.start is None else str(self.start)
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"

    def resolve(self, length: int) -> range | None:
        """Rows within `length`, or None if a bound lies outside."""
        start, stop = self._absolute(length)
        if not (0 <= start <= stop <= length):
            return None
        return range(start, stop)

    def _absolute(self, length: int) -> tuple[int, int]:
        start = 0 if self.start is None else self.start + (length if self.start < 0 else 0)
        if self.single:
            return start, start + 1
        stop = length if self.stop is None else self.stop + (length if self.stop < 0 else 0)
        return start, stop


EVERY: Final = Span(None, None)


@dataclass(frozen=True, slots=True)
class Picks:
    """Several indices, in canonical order: from the start, then from the end."""

    indices: tuple[int, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.indices))

    def resolve(self, length: int) -> Sequence[int] | None:
        """Rows within `length`, ascending, or None if an index lies outside; a row may appear twice."""
        rows = sorted(i + length if i < 0 else i for i in self.indices)
        return rows if rows[0] >= 0 and rows[-1] < length else None


@dataclass(frozen=True, slots=True)
class Mark:
    """What is looked up in a prompt's `Marks`: a text (and which occurrence), a role, or a mask's name."""

    kind: MarkKind
    name: str
    nth: int | None = None

    def __str__(self) -> str:
        nth = "" if self.nth is None else f", {self.nth}"
        return f"{self.kind}({json.dumps(self.name, ensure_ascii=False)}{nth})"


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector; `text` is its canonical spelling.

    Attributes:
        prompt: which rows, of the prompt or of `mark`; None for none.
        gen: which generated tokens.
        mark: where the rows are looked up before `prompt` counts in them.
    """

    text: str
    prompt: Span | Picks | None
    gen: Span | None
    mark: Mark | None = None

    @property
    def static(self) -> bool:
        """Whether the rows are known before anything is generated."""
        return self.gen is None


@dataclass(frozen=True, slots=True)
class Marks:
    """What is known of one prompt besides its length.

    Attributes:
        text: the whole text, None for a prompt of token ids.
        offsets: first and stop character of each token, never decreasing; empty for a token without text.
        roles: role, first and stop token of each message's content, in order.
        masks: by name, whether each token is meant.
        no_roles: why the messages of a conversation could not be found, None if they were or there are none.
    """

    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    roles: tuple[tuple[str, int, int], ...] = ()
    masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    no_roles: str | None = None

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Tokens that share a character with text[start:stop]."""
        first = bisect.bisect_right(self.offsets, start, key=lambda o: o[1])
        after = bisect.bisect_left(self.offsets, stop, lo=first, key=lambda o: o[0])
        return _compact([i for i in range(first, after) if self.offsets[i][0] < self.offsets[i][1]])


NO_MARKS: Final = Marks()


@dataclass(frozen=True, slots=True)
class Rows:
    """A selector resolved against one prompt: ascending prompt rows, and indices of generated tokens."""

    prompt: Sequence[int]
    gen: range


# ---- reading ----


def parse(text: str, path: str) -> Selector:
    """Reads a selector.

    Raises:
        ProgramError: `bad_position`.
    """
    if text == "all":
        return Selector("all", EVERY, EVERY)
    match = _FORM.fullmatch(text) or _MARK.fullmatch(text)
    if match is None:
        raise errors.refuse(
            "bad_position", path, f"{text[:80]!r} is not a position selector", closest=_nearest(text)
        )
    part = _part(match, path)
    what = match["what"]
    if what == "prompt":
        return Selector(f"prompt[{part}]", part, None)
    if what == "gen":
        return _gen(text, part, path)
    mark = _mark(match, path)
    return Selector(f"{mark}" if part == EVERY else f"{mark}[{part}]", part, None, mark)


def _part(match: re.Match[str], path: str) -> Span | Picks:
    if match["list"] is None:
        a, b = match["a"], match["b"]
        return Span(None if a is None else int(a), None if b is None else int(b))
    found = [int(i) for i in match["list"].split(",")]
    if len(found) == 1:
        return Span(found[0], None, single=True)
    twice = next((i for i in found if found.count(i) > 1), None)
    if twice is not None:
        raise errors.refuse(
            "bad_position", path, f"{match[0]!r} names {twice} twice",
            next_step="Name each position once: rows come in the order of the prompt.",
        )  # fmt: skip
    return Picks(tuple(sorted(found, key=lambda i: (i < 0, i))))


def _gen(text: str, part: Span | Picks, path: str) -> Selector:
    if isinstance(part, Picks):
        raise errors.refuse(
            "bad_position", path, f"{text!r}: gen takes one index or one slice",
            next_step="Use one node per generated token, or a slice such as gen[0:8].",
        )  # fmt: skip
    if any(n is not None and n < 0 for n in (part.start, part.stop)):
        raise errors.refuse(
            "bad_position",
            path,
            f"{text!r}: how many tokens will be generated is not known, so gen counts from 0",
        )
    return Selector(f"gen[{part}]", None, part)


def _mark(match: re.Match[str], path: str) -> Mark:
    kind: MarkKind = match["what"]  # type: ignore[assignment]
    try:
        name = json.loads(match["text"])
        name.encode()
    except ValueError as e:  # json.JSONDecodeError and UnicodeEncodeError are ValueErrors
        raise errors.refuse(
            "bad_position", path, f"{match[0][:80]!r}: the text in quotes is not a JSON string: {e}"[:200],
            next_step="Escape it as JSON does: json.dumps(text) writes it.",
        ) from None  # fmt: skip
    if not 1 <= len(name) <= MAX_TEXT:
        raise errors.refuse(
            "bad_position", path, f"{kind}(...) takes a text of 1 to {MAX_TEXT} characters, not {len(name)}",
            next_step="Name a shorter text.",
        )  # fmt: skip
    if kind != "span" and match["nth"] is not None:
        raise errors.refuse(
            "bad_position", path, f"{match[0]!r}: only span takes a second argument",
            closest=f"{Mark(kind, name)}[{int(match['nth'])}]",
        )  # fmt: skip
    return Mark(kind, name, None if match["nth"] is None else int(match["nth"]))


def _nearest(text: str) -> str | None:
    call = _CALL.match(text)
    if call:
        return f"{call[1]}({json.dumps(call[2].strip(), ensure_ascii=False)})"
    inner = re.search(r"-?[0-9]{1,7}(:-?[0-9]{1,7})?", text)
    if inner and "gen" in text:
        return f"gen[{inner[0]}]"
    return f"prompt[{inner[0]}]" if inner else errors.closest(text, ("prompt[*]", "gen[*]", "all"))


# ---- resolving ----


def resolve(
    selector: Selector,
    length: int,
    max_new_tokens: int,
    path: str,
    prompt_index: int,
    marks: Marks = NO_MARKS,
) -> Rows:
    """The rows of one prompt.

    Args:
        length: tokens of this prompt.
        max_new_tokens: how many tokens may be generated after it.
        prompt_index: for the message.
        marks: of this prompt.

    Raises:
        ProgramError: `position_out_of_range`; `bad_position` for a mark that the prompt does not have, or
            that is ambiguous.
    """
    looker = _Looker(selector, length, marks, path, prompt_index)
    gen = selector.gen.resolve(max_new_tokens) if selector.gen else EMPTY
    if gen is None:
        raise looker.outside(f"at most {max_new_tokens} tokens are generated")
    return Rows(looker.rows(), gen)


def work(mark: Mark, length: int, marks: Marks) -> int:
    """What looking a mark up in one prompt costs, in characters looked at or their like."""
    if mark.kind == "span":
        return len(marks.text or "") + 64 * (1 + (mark.nth or 1))
    return 16 * length


@dataclass(frozen=True, slots=True)
class _Looker:
    """One selector and one prompt."""

    selector: Selector
    length: int
    marks: Marks
    path: str
    index: int

    def rows(self) -> Sequence[int]:
        part, mark = self.selector.prompt, self.selector.mark
        if part is None:
            return EMPTY
        base: Sequence[int] = range(self.length) if mark is None else self._marked(mark)
        picked = part.resolve(len(base))
        if picked is None:
            held = f"has {len(base)} tokens" + ("" if mark is None else f" in {mark}")
            raise self.outside(f"prompt {self.index} {held}")
        if isinstance(picked, range):
            return base[picked.start : picked.stop]
        if len(set(picked)) < len(picked):
            raise self._bad(
                f"prompt {self.index} has {len(base)} tokens there, so that two of the indices are one token",
                "Name each token once.",
            )
        return _compact([base[i] for i in picked])

    def outside(self, limit: str) -> errors.TrocarError:
        return errors.refuse("position_out_of_range", self.path, f"{self.selector.text!r}: {limit}")

    def _bad(self, reason: str, next_step: str, closest: str | None = None) -> errors.TrocarError:
        reason = f"{self.selector.text!r}: {reason}"
        return errors.refuse("bad_position", self.path, reason, next_step=next_step, closest=closest)

    def _marked(self, mark: Mark) -> Sequence[int]:
        if mark.kind == "span":
            return self._span(mark)
        return self._role(mark.name) if mark.kind == "role" else self._mask(mark.name)

    def _span(self, mark: Mark) -> Sequence[int]:
        if self.marks.text is None:
            raise self._bad(
                f"prompt {self.index} is token ids, in which no text can be found",
                "Send the prompt as text or messages, or select by index or mask.",
            )
        start = self._occurrence(self.marks.text, mark)
        return self.marks.tokens(start, start + len(mark.name))

    def _occurrence(self, text: str, mark: Mark) -> int:
        """Where the text that is meant begins; occurrences may overlap."""
        nth, found, at = mark.nth or 0, 0, text.find(mark.name)
        start = at
        while at >= 0 and found < nth:
            found, at = found + 1, text.find(mark.name, at + 1)
            start = at
        if at < 0:
            times = f"contains it {found} times" if found else "does not contain this text"
            raise errors.refuse(
                "position_out_of_range", self.path, f"{self.selector.text!r}: prompt {self.index} {times}",
                next_step="Name a text that every prompt contains; occurrences count from 0.",
            )  # fmt: skip
        if mark.nth is None and text.find(mark.name, start + 1) >= 0:
            raise self._bad(
                f"prompt {self.index} contains this text {_count(text, mark.name)} times",
                f"Name a longer text, or one occurrence: {Mark('span', mark.name, 0)}.",
            )
        return start

    def _role(self, name: str) -> Sequence[int]:
        here = tuple(dict.fromkeys(role for role, _, _ in self.marks.roles))
        if self.marks.no_roles is not None:
            raise self._bad(
                f"prompt {self.index}: {self.marks.no_roles}", "Select by span(...), index or mask."
            )
        if not here:
            raise self._bad(
                f"prompt {self.index} is not a conversation",
                "Send messages, or select by span(...), index or mask.",
            )
        if name not in here:
            raise self._bad(
                f"prompt {self.index} has no message of this role; it has {', '.join(here)}"[:200],
                "Name a role that every conversation has.",
                errors.closest(name, here),
            )
        return _compact([i for role, a, b in self.marks.roles if role == name for i in range(a, b)])

    def _mask(self, name: str) -> Sequence[int]:
        mask = self.marks.masks.get(name)
        if mask is None:
            raise self._bad(
                "the request carries no mask of this name",
                "Send it in `masks`: one list of true and false per prompt.",
                errors.closest(name, self.marks.masks),
            )
        if len(mask) != self.length:
            raise self._bad(
                f"its row for prompt {self.index} has {len(mask)} entries, the prompt has {self.length} tokens",
                "Send one entry per token, special tokens included: `model.tokenize(text)` shows them.",
            )
        return _compact([i for i, meant in enumerate(mask) if meant])


def _count(text: str, part: str) -> int:
    found, at = 0, text.find(part)
    while at >= 0:
        found, at = found + 1, text.find(part, at + 1)
    return found


def _compact(rows: Sequence[int]) -> Sequence[int]:
    """Ascending distinct rows, as a range where they are neighbours."""
    if rows and rows[-1] - rows[0] + 1 == len(rows):
        return range(rows[0], rows[-1] + 1)
    return tuple(rows)
