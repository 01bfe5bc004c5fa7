"""Any selector selects what a naive reading says, whatever else is in the request, and quickly."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass

from graph_room import PAPER, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors
from trocar.graph import positions
from trocar.graph.positions import Marks
from trocar.graph.program import Generation
from trocar.graph.scope import Scope, Walk

FAST = settings(max_examples=150, deadline=None)
ROLES = ("system", "user", "assistant")
SLACK = 4  # the machine is shared


@dataclass(frozen=True)
class Prompt:
    marks: Marks
    length: int


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """A text of few letters, cut into tokens; some tokens are parts of one character, some have no text."""
    pieces = draw(st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=8))
    offsets, at = [(0, 0)] * draw(st.integers(0, 1)), 0
    for piece in pieces:
        offsets += [(at, at + len(piece))] * (2 if len(piece) == 1 and draw(st.booleans()) else 1)
        at += len(piece)
    offsets += [(at, at)] * draw(st.integers(0, 1))
    n = len(offsets)
    cuts = sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=6)))
    roles = tuple((draw(st.sampled_from(ROLES)), a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False))
    mask = tuple(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return Prompt(Marks("".join(pieces), tuple(offsets), roles, {"m": mask}), n)


@st.composite
def selectors(draw: st.DrawFn) -> tuple[str, str, str, int | None, str]:
    """Spelling, kind, name, occurrence and what follows in brackets."""
    kind = draw(st.sampled_from(("prompt", "span", "role", "mask")))
    name = {"span": draw(st.text("ab é", min_size=1, max_size=3)), "role": draw(st.sampled_from(ROLES))}.get(
        kind, "m"
    )
    nth = draw(st.none() | st.integers(0, 3)) if kind == "span" else None
    small = st.integers(-4, 4)
    inside = draw(
        st.just("*")
        | small.map(str)
        | st.lists(small, min_size=2, max_size=4, unique=True).map(lambda x: ",".join(map(str, x)))
        | st.tuples(st.none() | small, st.none() | small).map(
            lambda x: ":".join("" if i is None else str(i) for i in x)
        )
    )
    call = "prompt" if kind == "prompt" else f"{kind}({json.dumps(name)}{'' if nth is None else f', {nth}'})"
    return f"{call}[{inside}]", kind, name, nth, inside


def naive(kind: str, name: str, nth: int | None, inside: str, prompt: Prompt) -> list[int] | None:
    """The rows by brute force, None where the selector must be refused."""
    base = _base(kind, name, nth, prompt)
    if base is None:
        return None
    if inside == "*":
        return base
    n = len(base)
    if ":" in inside:
        a, b = (int(x) if x else None for x in inside.split(":"))
        first = 0 if a is None else a + n * (a < 0)
        after = n if b is None else b + n * (b < 0)
        return base[first:after] if 0 <= first <= after <= n else None
    picked = [int(i) for i in inside.split(",")]
    if any(not -n <= i < n for i in picked):
        return None
    found = {base[i] for i in picked}
    return sorted(found) if len(found) == len(picked) else None


def _base(kind: str, name: str, nth: int | None, prompt: Prompt) -> list[int] | None:
    marks, tokens = prompt.marks, range(prompt.length)
    if kind == "prompt":
        return list(tokens)
    if kind == "mask":
        return [i for i in tokens if marks.masks["m"][i]]
    if kind == "role":
        parts = [range(a, b) for role, a, b in marks.roles if role == name]
        return [i for i in tokens if any(i in p for p in parts)] if parts else None
    text = marks.text or ""
    starts = [i for i in range(len(text)) if text[i : i + len(name)] == name]
    if nth is None and len(starts) != 1:
        return None
    if (nth or 0) >= len(starts):
        return None
    meant = set(range(starts[nth or 0], starts[nth or 0] + len(name)))
    return [i for i in tokens if meant & set(range(*marks.offsets[i]))]


@FAST
@given(prompts(), selectors())
def test_a_selector_selects_what_it_says(
    prompt: Prompt, selector: tuple[str, str, str, int | None, str]
) -> None:
    text, *parts = selector
    expected = naive(*parts, prompt)
    parsed = positions.parse(text, "at")
    assert positions.parse(parsed.text, "at") == parsed
    found: list[int] | None = None
    with suppress(errors.ProgramError):
        found = list(positions.resolve(parsed, prompt.length, 0, "at", 0, prompt.marks).prompt)
    assert found == expected


@FAST
@given(st.lists(prompts(), min_size=1, max_size=4), selectors())
def test_other_prompts_do_not_matter(
    several: list[Prompt], selector: tuple[str, str, str, int | None, str]
) -> None:
    text = selector[0]
    alone = [_selected([p], text) for p in several]
    together = _selected(several, text)
    if any(a is None for a in alone):
        assert together is None
    else:
        assert together == [rows for a in alone for rows in a or []]


def _selected(several: list[Prompt], text: str) -> list[list[int]] | None:
    lengths, marks = tuple(p.length for p in several), tuple(p.marks for p in several)
    try:
        found = Walk(Scope(PAPER, lengths, Generation(), {}, {}, encode, marks)).select(text, "at")
    except errors.ProgramError:
        return None
    assert found.counts == tuple(len(r.prompt) for r in found.rows)
    return [list(r.prompt) for r in found.rows]


def test_four_thousand_prompts_are_quick() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 5
    offsets = tuple((i, i + 4) for i in range(0, len(text), 4))
    marks = Marks(text, offsets, (("user", 5, 40), ("user", 45, 50)), {"m": (True, False) * 27 + (True,)})
    here = Walk(Scope(PAPER, (len(offsets),) * 4096, Generation(), {}, {}, encode, (marks,) * 4096))
    started = time.thread_time()
    for i in range(5):
        for selector in (f'span("fox", {i})', f'role("user")[{i}:]', f'mask("m")[{i}]', f"prompt[{i},-1]"):
            here.select(selector, "at")
    assert time.thread_time() - started < 1.0 * SLACK
