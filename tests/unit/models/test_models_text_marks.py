"""Where tokens stand in a prompt, and where the messages of a conversation are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trocar.graph import positions
from trocar.graph.positions import Marks
from trocar.models.text import Marked, TextCodec

SHARED = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text("aé€ user\n<|>", max_size=8)


@pytest.fixture
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer)


def texts_of(codec: TextCodec, marked: Marked) -> list[tuple[str, str]]:
    """Role and text of each message's tokens."""
    return [(role, codec.decode(marked.ids[a:b], special=True)) for role, a, b in marked.marks.roles]


def selected(codec: TextCodec, marked: Marked, at: str) -> str:
    rows = positions.resolve(positions.parse(at, "at"), len(marked.ids), 0, "at", 0, marked.marks).prompt
    return codec.decode([marked.ids[i] for i in rows])


def test_offsets_count_characters(codec: TextCodec) -> None:
    marked = codec.mark_prompt("é€x")
    assert marked.ids == codec.encode_prompt("é€x")
    assert marked.marks == Marks("é€x", ((0, 1), (0, 1), (1, 2), (1, 2), (1, 2), (2, 3)))


@SHARED
@given(st.text(max_size=12).filter(lambda t: "<|" not in t), st.data())
def test_a_byte_tokenizer_puts_each_byte_at_its_character(codec: TextCodec, text: str, data: Any) -> None:
    marked = codec.mark_prompt(text)
    expected = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]
    assert list(marked.marks.offsets) == expected
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        stop = data.draw(st.integers(start + 1, len(text)))
        tokens = marked.marks.tokens(start, stop)
        assert codec.decode([marked.ids[i] for i in tokens]) == text[start:stop]


def test_added_special_tokens_have_no_text(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|a|> $A <|b|>", special_tokens=[("<|a|>", 256), ("<|b|>", 257)]
    )
    codec = TextCodec(tokenizer)
    marked = codec.mark_prompt("hi")
    assert [marked.ids[0], marked.ids[-1]] == [256, 257]
    assert marked.marks.offsets == ((0, 0), (0, 1), (1, 2), (2, 2))
    assert list(marked.marks.tokens(0, 2)) == [1, 2]


def test_roles_of_a_conversation(codec: TextCodec) -> None:
    chat = [
        {"role": "system", "content": "user"},
        {"role": "user", "content": "é\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "user"},
    ]
    marked = codec.mark_chat(chat)
    assert marked.ids == codec.chat(chat)
    assert texts_of(codec, marked) == [(m["role"], m["content"]) for m in chat]
    assert selected(codec, marked, 'role("user")') == "é\nuser"
    assert selected(codec, marked, 'role("system")[-2:]') == "er"


@SHARED
@given(st.lists(st.tuples(st.sampled_from(("system", "user", "Zq0qZ")), WORDS), min_size=1, max_size=4))
def test_contents_are_found_wherever_else_they_stand(codec: TextCodec, turns: list[tuple[str, str]]) -> None:
    chat = [{"role": role, "content": text} for role, text in turns]
    if any("<|" in text or "|>" in text for _, text in turns):
        return
    marked = codec.mark_chat(chat)
    if marked.marks.no_roles is None:
        assert texts_of(codec, marked) == turns
    else:
        assert any(role == "Zq0qZ" for role, _ in turns)


def test_a_template_may_trim(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<|a|>{{ m['content'] | trim }}\n{% endfor %}"
    codec = TextCodec(tokenizer)
    marked = codec.mark_chat([{"role": "user", "content": " hi \n"}, {"role": "user", "content": "  "}])
    assert texts_of(codec, marked) == [("user", "hi"), ("user", "")]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
        "only {{ messages | length }} messages",
        "{{ messages[0]['content'][1:] }}",
        "{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_changes_a_message_leaves_the_roles_unknown(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    marked = TextCodec(tokenizer).mark_chat([{"role": "user", "content": "hello you"}])
    assert marked.marks.roles == ()
    assert "does not show where each message" in (marked.marks.no_roles or "")


def test_a_template_may_move_a_message(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[1]['content'] }}<|a|>{{ messages[0]['content'] }}"
    codec = TextCodec(tokenizer)
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    marked = codec.mark_chat(chat)
    assert marked.marks.roles == (("system", 3, 5), ("user", 0, 2))


@pytest.mark.model
def test_the_real_tokenizer(smollm2: Any) -> None:
    codec = smollm2.text
    marked = codec.mark_prompt("The city of Köln is 日本 🙂 large")
    assert selected(codec, marked, 'span("city of")') == " city of"
    assert selected(codec, marked, 'span("Köln")') == " Köln"
    assert selected(codec, marked, 'span("🙂")').strip() == "🙂"
    chat = [{"role": "user", "content": "user asks assistant"}, {"role": "assistant", "content": " yes\n"}]
    marked = codec.mark_chat(chat)
    assert texts_of(codec, marked) == [(m["role"], m["content"]) for m in chat]
    assert marked.ids == codec.chat(chat)
