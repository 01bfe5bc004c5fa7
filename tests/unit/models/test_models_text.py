"""User text cannot spell special tokens; the template can."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from trocar import errors
from trocar.models.text import TextCodec


@pytest.fixture
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer)


def test_a_special_spelling_is_plain_text(codec: TextCodec, tokenizer: Any) -> None:
    assert tokenizer("<|b|>").input_ids == [257]  # the library itself would let it through
    ids = codec.tokenize("x<|b|>")
    assert max(ids) < 256
    assert codec.decode(ids) == "x<|b|>"


@pytest.mark.parametrize("text", ["", " two  spaces", "héllo €\n", "<|a|><|b|>"])
def test_round_trip(codec: TextCodec, text: str) -> None:
    assert codec.decode(codec.tokenize(text)) == text


def test_decode_leaves_special_tokens_out_unless_asked(codec: TextCodec) -> None:
    ids = [*codec.tokenize("hi"), 257]
    assert codec.decode(ids) == "hi"
    assert codec.decode(ids, special=True) == "hi<|b|>"


def test_token_texts_keep_spaces_and_show_parts_of_characters(codec: TextCodec) -> None:
    assert codec.token_texts([*codec.tokenize(" a"), 256]) == [" ", "a", "<|a|>"]
    assert codec.token_texts(codec.tokenize("é")) == ["\ufffd", "\ufffd"]


def test_chat_writes_the_template_with_real_special_tokens(codec: TextCodec) -> None:
    ids = codec.chat([{"role": "user", "content": "hi"}])
    plain = codec.tokenize
    assert ids == [256, *plain("user\nhi"), 257, *plain("\n"), 256, *plain("assistant\n")]


@pytest.mark.parametrize("field", ["role", "content"])
@pytest.mark.parametrize("token", ["<|a|>", "<|b|>", "<|end|>"])
def test_a_message_that_spells_a_special_token_is_refused(codec: TextCodec, field: str, token: str) -> None:
    bad = {"role": "user", "content": "hi", field: f"x{token}y"}
    with pytest.raises(errors.ProgramError) as e:
        codec.chat([{"role": "user", "content": "ok"}, bad])
    assert (e.value.code, e.value.path) == ("bad_value", f"messages[1].{field}")
    assert token in e.value.reason


def test_a_special_token_that_only_the_template_completes_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '|>' }}{% endfor %}"
    with pytest.raises(errors.ProgramError, match="would spell"):
        TextCodec(tokenizer).chat([{"role": "user", "content": "x<|b"}])


def test_chat_refusals(codec: TextCodec, tokenizer: Any) -> None:
    with pytest.raises(errors.ProgramError, match="empty_prompt"):
        codec.chat([])
    with pytest.raises(errors.ProgramError, match="missing_field"):
        codec.chat([{"role": "user"}])
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(errors.ProgramError, match="no system role"):
        codec.chat([{"role": "system", "content": "x"}])
    tokenizer.chat_template = None
    with pytest.raises(errors.ProgramError, match="no chat template"):
        codec.chat([{"role": "user", "content": "x"}])


def test_two_threads_do_not_change_each_others_rules(codec: TextCodec, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    expected = codec.tokenize("<|a|>"), codec.chat(chat)

    def both(_i: int) -> tuple[list[int], list[int]]:
        return codec.tokenize("<|a|>"), codec.chat(chat)

    with ThreadPoolExecutor(4) as pool:
        assert all(got == expected for got in pool.map(both, range(200)))


def test_a_tokenizer_without_a_core_is_refused() -> None:
    with pytest.raises(errors.RunFailed, match="model_unsupported"):
        TextCodec(object())


def test_an_added_token_that_is_not_special_is_ordinary_text(tokenizer: Any) -> None:
    """Gemma's tokenizer lists line breaks so: a prompt of two lines is no attempt to fake a turn."""
    tokenizer.add_tokens(["\n\n"])
    lines = TextCodec(tokenizer)
    ids = lines.encode_prompt("a\n\nb")
    assert tokenizer.convert_tokens_to_ids("\n\n") in ids
    assert lines.decode(ids) == "a\n\nb"
    with pytest.raises(errors.ProgramError):
        lines.encode_prompt("a<|a|>b")
