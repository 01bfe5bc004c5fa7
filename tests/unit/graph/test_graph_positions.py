"""Selectors of lists, texts, roles and masks: what they select, how they are spelt, why they are refused."""

from __future__ import annotations

from typing import Any

import pytest
from graph_room import PAPER, encode

from trocar import errors
from trocar.graph import positions
from trocar.graph.positions import Marks
from trocar.graph.program import Generation
from trocar.graph.scope import Scope, Walk

#       The cat sat on the mat          and tokens: The| cat| sat| on| the| mat
TEXT = "The cat sat on the mat"
PLAIN = Marks(TEXT, ((0, 3), (3, 7), (7, 11), (11, 14), (14, 18), (18, 22)))
TRIMMED = Marks(TEXT, ((0, 3), (4, 7), (8, 11), (12, 14), (15, 18), (19, 22)))
CHAT = Marks(
    "S:be|U:hi|A:yo|U:so",
    tuple((i, i + 1) for i in range(19)),
    (("system", 2, 4), ("user", 7, 9), ("assistant", 12, 14), ("user", 17, 19)),
)


def rows(text: str, marks: Marks, length: int | None = None) -> list[int]:
    selector = positions.parse(text, "at")
    found = positions.resolve(selector, length or len(marks.offsets), 0, "at", 0, marks)
    assert list(found.gen) == []
    return list(found.prompt)


def refusal(text: str, marks: Marks = PLAIN, length: int | None = None) -> errors.Refusal:
    with pytest.raises(errors.ProgramError) as caught:
        rows(text, marks, length)
    (found,) = caught.value.refusals
    assert found.path == "at"
    assert found.next_step
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt[1,4,-1]", [1, 4, 5]),
        ("prompt[-1,0]", [0, 5]),
        ("prompt[3,2]", [2, 3]),
        ('span("cat")', [1]),
        ('span("at sat")', [1, 2]),
        ('span("cat sat on")[-1]', [3]),
        ('span("cat sat on")[0,2]', [1, 3]),
        ('span("cat sat on")[1:]', [2, 3]),
        ('span("cat")[*]', [1]),
        ('span("at", 1)', [2]),
        ('span("at", 2)', [5]),
        ('span("\\u0063at")', [1]),
    ],
)
def test_rows(text: str, expected: list[int]) -> None:
    assert rows(text, PLAIN) == expected


def test_a_space_belongs_to_the_token_whose_offsets_hold_it() -> None:
    assert rows('span("cat ")', PLAIN) == [1, 2]
    assert rows('span("cat ")', TRIMMED) == [1]
    assert rows('span(" cat")', PLAIN) == rows('span(" cat")', TRIMMED) == [1]


def test_parts_of_one_character_belong_together() -> None:
    marks = Marks("aéb", ((0, 0), (0, 1), (1, 2), (1, 2), (2, 3), (3, 3)))
    assert rows('span("é")', marks) == [2, 3]
    assert rows('span("aéb")', marks) == [1, 2, 3, 4]


def test_roles() -> None:
    assert rows('role("user")', CHAT) == [7, 8, 17, 18]
    assert rows('role("user")[-2:]', CHAT) == [17, 18]
    assert rows('role("user")[1,-1]', CHAT) == [8, 18]
    assert rows('role("assistant")', CHAT) == [12, 13]


def test_masks() -> None:
    marks = Marks(masks={"subject": (False, True, True, False, True)})
    assert rows('mask("subject")', marks, 5) == [1, 2, 4]
    assert rows('mask("subject")[-1]', marks, 5) == [4]


def test_neighbours_are_a_range() -> None:
    for text in ("prompt[2,1]", 'span("cat sat")', "prompt[*]"):
        found = positions.resolve(positions.parse(text, "at"), 6, 0, "at", 0, PLAIN)
        assert isinstance(found.prompt, range)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("prompt[4,-1,1,-3]", "prompt[1,4,-3,-1]"),
        ("prompt[01,-0]", "prompt[0,1]"),
        ('span("a",2)', 'span("a", 2)'),
        ('span("\\u00e9\\/")[:]', 'span("é/")'),
        ('role("user")[*]', 'role("user")'),
        ('mask("m")[3,1]', 'mask("m")[1,3]'),
    ],
)
def test_one_spelling(text: str, canonical: str) -> None:
    selector = positions.parse(text, "at")
    assert selector.text == canonical
    assert positions.parse(canonical, "at") == selector
    assert selector.static


@pytest.mark.parametrize(
    ("text", "names", "closest"),
    [
        ("prompt[1,1]", "1 twice", None),
        ("prompt[1,]", "not a position selector", "prompt[1]"),
        ("prompt[1,2:3]", "not a position selector", "prompt[1]"),
        ("gen[0,1]", "one index or one slice", None),
        ("span('Paris')", "not a position selector", 'span("Paris")'),
        ("span(Paris)", "not a position selector", 'span("Paris")'),
        ('span("a", -1)', "not a position selector", 'span("a")'),
        ('span("")', "1 to 200 characters, not 0", None),
        (f'span("{"x" * 201}")', "1 to 200 characters, not 201", None),
        ('span("\\x")', "not a JSON string", None),
        ('span("a\nb")', "not a JSON string", None),
        ('span("\\ud800")', "not a JSON string", None),
        ('role("user", 1)', "only span", 'role("user")[1]'),
        ('span("a")[0][1]', "not a position selector", 'span("a")'),
        ('Span("a")', "not a position selector", None),
        (' span("a")', "not a position selector", None),
    ],
)
def test_what_cannot_be_read(text: str, names: str, closest: str | None) -> None:
    found = refusal(text)
    assert (found.code, found.closest) == ("bad_position", closest)
    assert names in found.reason


@pytest.mark.parametrize(
    ("text", "marks", "code", "names", "closest"),
    [
        ("prompt[0,6]", PLAIN, "position_out_of_range", "prompt 0 has 6 tokens", None),
        ("prompt[-7,0]", PLAIN, "position_out_of_range", "prompt 0 has 6 tokens", None),
        ("prompt[5,-1]", PLAIN, "bad_position", "two of the indices are one token", None),
        ('span("dog")', PLAIN, "position_out_of_range", "prompt 0 does not contain this text", None),
        ('span("at", 3)', PLAIN, "position_out_of_range", "prompt 0 contains it 3 times", None),
        ('span("at")', PLAIN, "bad_position", "contains this text 3 times", None),
        ('span("aa")', Marks("aaa", ((0, 3),)), "bad_position", "contains this text 2 times", None),
        ('span("cat")[1]', PLAIN, "position_out_of_range", '1 tokens in span("cat")', None),
        ('span("cat")', Marks(), "bad_position", "is token ids", None),
        ('role("user")', PLAIN, "bad_position", "is not a conversation", None),
        ('role("usr")', CHAT, "bad_position", "it has system, user, assistant", "user"),
        ('role("user")', Marks("x", ((0, 1),), no_roles="why"), "bad_position", "prompt 0: why", None),
        ('mask("subjects")', Marks(masks={"subject": (True,)}), "bad_position", "no mask", "subject"),
        ('mask("m")', Marks(masks={"m": (True, False)}), "bad_position", "2 entries, the prompt has 6", None),
    ],
)
def test_what_a_prompt_does_not_have(
    text: str, marks: Marks, code: str, names: str, closest: str | None
) -> None:
    found = refusal(text, marks, 6)
    assert (found.code, found.closest) == (code, closest)
    assert names in found.reason


# ---- over several prompts -------------------------------------------------------------------------


def walk(*marks: Marks, lengths: tuple[int, ...] | None = None) -> Walk:
    lengths = lengths or tuple(len(m.offsets) for m in marks)
    return Walk(Scope(PAPER, lengths, Generation(), {}, {}, encode, marks))


def test_each_prompt_has_its_own_rows() -> None:
    other = Marks("a cat on the mat, sat", ((0, 1), (1, 5), (5, 8), (8, 12), (12, 17), (17, 21)))
    found = walk(PLAIN, other).select('span("cat")', "at")
    assert [list(r.prompt) for r in found.rows] == [[1], [1]]
    found = walk(PLAIN, other).select('span("sat")', "at")
    assert [list(r.prompt) for r in found.rows] == [[2], [5]]
    assert (found.counts, found.has_gen) == ((1, 1), False)


def test_the_prompt_at_fault_is_named() -> None:
    with pytest.raises(errors.ProgramError, match="prompt 1 does not contain"):
        walk(PLAIN, Marks("no", ((0, 2),))).select('span("cat")', "at")


def test_a_mask_without_a_token_is_refused() -> None:
    marks = [Marks(masks={"m": (True, False)}), Marks(masks={"m": (False, False)})]
    with pytest.raises(errors.ProgramError, match="touches_nothing") as caught:
        walk(*marks, lengths=(2, 2)).select('mask("m")', "at")
    assert "of prompt 1" in caught.value.reason


def test_a_text_that_no_token_holds_is_refused() -> None:
    with pytest.raises(errors.ProgramError, match="touches_nothing"):
        walk(Marks("a b", ((0, 1), (2, 3)))).select('span(" ")', "at")


def test_without_marks_nothing_is_found() -> None:
    with pytest.raises(errors.ProgramError, match="token ids"):
        Walk(Scope(PAPER, (3,), Generation(), {}, {}, encode)).select('span("a")', "at")


def test_a_spelling_is_resolved_once() -> None:
    here = walk(PLAIN)
    assert here.select('span("cat")[:]', "at") is here.select('span("cat")', "at")


def test_looking_up_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar.graph.scope.MAX_MARKED", 500)
    here: Any = walk(PLAIN)
    here.select('span("cat")', "at")
    with pytest.raises(errors.ProgramError, match="too_expensive"):
        [here.select(f'span("at", {i})', "at") for i in (0, 1, 2)]
