"""Position selectors: which tokens of each prompt, and of what is generated, a node touches.

    prompt[-1]   prompt[3]   prompt[3:7]   prompt[:-1]   prompt[*]
    gen[*]       gen[0]      gen[0:32]                     all  (= prompt[*] and gen[*])

`prompt` indices count within one prompt, negative ones from its end, and are resolved before any batching
or padding. `gen[j]` is the row of the j-th generated token when it is fed back. A bound outside the prompt
is refused, never clipped. This module knows lengths, not tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from trocar import errors

Phase = Literal["prompt", "gen"]
_FORM: Final = re.compile(r"^(prompt|gen)\[(?:(\*)|(-?[0-9]{1,7})|(-?[0-9]{1,7})?:(-?[0-9]{1,7})?)\]$")
EMPTY: Final = range(0)


@dataclass(frozen=True, slots=True)
class Span:
    """An index (`stop` is None and `single`), a slice, or everything."""

    start: int | None
    stop: int | None
    single: bool = False

    def __str__(self) -> str:
        if self.single or self == Span(None, None):
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


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector; `text` is its canonical spelling."""

    text: str
    prompt: Span | None
    gen: Span | None

    @property
    def static(self) -> bool:
        """Whether the rows are known before anything is generated."""
        return self.gen is None


@dataclass(frozen=True, slots=True)
class Rows:
    """A selector resolved against one prompt: absolute prompt rows, and indices of generated tokens."""

    prompt: range
    gen: range


def parse(text: str, path: str) -> Selector:
    """Reads a selector.

    Raises:
        ProgramError: `bad_position`.
    """
    if text == "all":
        return Selector("all", Span(None, None), Span(None, None))
    match = _FORM.fullmatch(text)
    if match is None:
        raise errors.refuse(
            "bad_position", path, f"{text[:80]!r} is not a position selector", closest=_nearest(text)
        )
    span = _span(match)
    if match[1] == "gen" and any(n is not None and n < 0 for n in (span.start, span.stop)):
        raise errors.refuse(
            "bad_position",
            path,
            f"{text!r}: how many tokens will be generated is not known, so gen counts from 0",
        )
    text = f"{match[1]}[{span}]"
    return Selector(text, span, None) if match[1] == "prompt" else Selector(text, None, span)


def _span(match: re.Match[str]) -> Span:
    if match[2]:
        return Span(None, None)
    if match[3] is not None:
        return Span(int(match[3]), None, single=True)
    return Span(None if match[4] is None else int(match[4]), None if match[5] is None else int(match[5]))


def _nearest(text: str) -> str | None:
    inner = re.search(r"-?[0-9]{1,7}(:-?[0-9]{1,7})?", text)
    if inner and "gen" in text:
        return f"gen[{inner[0]}]"
    return f"prompt[{inner[0]}]" if inner else errors.closest(text, ("prompt[*]", "gen[*]", "all"))


def resolve(selector: Selector, length: int, max_new_tokens: int, path: str, prompt_index: int) -> Rows:
    """The rows of one prompt.

    Args:
        length: tokens of this prompt.
        max_new_tokens: how many tokens may be generated after it.
        prompt_index: for the message.

    Raises:
        ProgramError: `position_out_of_range`.
    """
    prompt = _part(selector, selector.prompt, length, f"prompt {prompt_index} has {length} tokens", path)
    gen = _part(
        selector, selector.gen, max_new_tokens, f"at most {max_new_tokens} tokens are generated", path
    )
    return Rows(prompt, gen)


def _part(selector: Selector, span: Span | None, length: int, limit: str, path: str) -> range:
    if span is None:
        return EMPTY
    rows = span.resolve(length)
    if rows is None:
        raise errors.refuse("position_out_of_range", path, f"{selector.text!r}: {limit}")
    return rows
