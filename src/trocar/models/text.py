"""Text to tokens and back, with special tokens that only the server can spell.

User text is plain text: `<|im_end|>` typed by a user becomes several ordinary tokens. Chat goes through the
model's own template, whose special tokens are real; a message that contains the spelling of an added token is
refused rather than changed. Two private copies of the tokenizer's core are used and never reconfigured,
because the library's own `split_special_tokens=True` flips a switch on the shared one and races.

`mark_prompt` and `mark_chat` also say where tokens stand in the text, for selectors. Where the messages of a
conversation are is proved, not guessed: the template is rendered once more around placeholders, and what
stands between those must rebuild the real text exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from trocar import errors
from trocar.graph.positions import Marks

Message = Mapping[str, str]
_MOVED = "the chat template does not show where each message stands"


@dataclass(frozen=True, slots=True)
class Marked:
    """Token ids of one prompt, and where they stand in its text."""

    ids: list[int]
    marks: Marks


class TextCodec:
    """One model's tokenizer, safe to use from several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Raises:
        RunFailed: `model_unsupported` for a tokenizer without a fast core.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise errors.refuse("model_unsupported", "model", "its tokenizer has no tokenizer.json")
        self._tokenizer = tokenizer
        self._plain = _copy(tokenizer)
        self._plain.encode_special_tokens = True
        self._real = _copy(tokenizer)
        # an added token that is not special (a line break, say) is ordinary text to the tokenizer
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added, and special-token spellings are ordinary text."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str, *, path: str = "prompt") -> list[int]:
        """Token ids of a whole prompt, with what the tokenizer itself adds (a BOS token where there is one).

        Raises:
            ProgramError: `special_token_text` when the text spells a special token: as plain text it would
                mean something else than its author thinks, without any error.
        """
        self._check_plain(text, path)
        ids: list[int] = self._plain.encode(text, add_special_tokens=True).ids
        return ids

    def mark_prompt(self, text: str, *, path: str = "prompt") -> Marked:
        """As `encode_prompt`, with the place of each token in the text."""
        self._check_plain(text, path)
        encoding = self._plain.encode(text, add_special_tokens=True)
        return Marked(encoding.ids, Marks(text, _ascending(encoding.offsets)))

    def _check_plain(self, text: str, path: str) -> None:
        spelt = next((name for name in self._special if name in text), None)
        if spelt is not None:
            raise errors.refuse("special_token_text", path, f"the text spells the special token {spelt!r}")

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless `special`."""
        text: str = self._real.decode(list(ids), skip_special_tokens=not special)
        return text

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each id alone, leading space included; a part of a UTF-8 character shows as U+FFFD."""
        return [self._one(i) for i in ids]

    def _one(self, token: int) -> str:
        """A decoder may drop the first space of a text, so the token is read where it follows itself."""
        alone = self.decode([token], special=True)
        return self.decode([token, token], special=True)[len(alone) :]

    def chat(self, messages: Sequence[Message], *, path: str = "messages") -> list[int]:
        """Token ids of a conversation in the model's own template, ready for the assistant's answer.

        Args:
            messages: `{"role": ..., "content": ...}`, in order.
            path: JSON path of the messages, for refusals.

        Raises:
            ProgramError: `bad_value` when the model has no template, when a role or content contains the
                spelling of a special token, or when the template does not take the conversation;
                `missing_field`; `empty_prompt` for no message.
        """
        return self._chat(messages, path)[0].ids  # type: ignore[no-any-return]

    def mark_chat(self, messages: Sequence[Message], *, path: str = "messages") -> Marked:
        """As `chat`, with the place of each token in the rendered text and of each message's content.

        A template may trim a message. One that changes or repeats it leaves the roles unknown, with the reason.
        """
        encoding, text, frame = self._chat(messages, path)
        marks = Marks(text, _ascending(encoding.offsets))
        places = _places(text, frame, [m["content"] for m in messages])
        if places is None:
            return Marked(encoding.ids, Marks(text, marks.offsets, no_roles=_MOVED))
        found = zip(messages, (_bounds(marks, *place) for place in places), strict=True)
        roles = tuple((m["role"], first, stop) for m, (first, stop) in found)
        return Marked(encoding.ids, Marks(text, marks.offsets, roles))

    def _chat(self, messages: Sequence[Message], path: str) -> tuple[Any, str, str]:
        """The conversation's encoding and text, and the same conversation around placeholders."""
        if not self._tokenizer.chat_template:
            reason = "this model has no chat template"
            raise errors.refuse("bad_value", path, reason, next_step="Send a prompt instead of messages.")
        if not messages:
            raise errors.refuse("empty_prompt", path, "there is no message")
        for i, message in enumerate(messages):
            self._check_message(message, f"{path}[{i}]")
        text = self._render(messages, path)
        harmless = [{**m, "content": m["content"] and _placeholder(i)} for i, m in enumerate(messages)]
        frame = self._render(harmless, path)
        encoding = self._real.encode(text, add_special_tokens=False)
        framed = self._real.encode(frame, add_special_tokens=False)
        if self._specials(encoding.ids) != self._specials(framed.ids):
            reason = "a message, put into the chat template, would spell a special token of this model"
            raise errors.refuse("bad_value", path, reason)
        return encoding, text, frame

    def _render(self, messages: Sequence[Message], path: str) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as e:
            raise errors.refuse(
                "bad_value", path, f"the chat template refuses this: {str(e)[:200]}"
            ) from None
        return text

    def _specials(self, ids: Sequence[int]) -> list[int]:
        known = set(self._special.values())
        return [i for i in ids if i in known]

    def _check_message(self, message: Message, path: str) -> None:
        for name in ("role", "content"):
            if name not in message:
                raise errors.refuse("missing_field", f"{path}.{name}", f"the field {name!r} is required")
        for name, value in message.items():
            found = next((s for s in self._special if s in value), None)
            if found is not None:
                reason = f"it contains {found!r}, which is a special token of this model and not text"
                step = "Remove it, or put a space inside it: only the template may write special tokens."
                raise errors.refuse("bad_value", f"{path}.{name}", reason, next_step=step)


def codec_at(home: Path) -> TextCodec:
    """The codec of a model directory, whose weights are not touched.

    Raises:
        RunFailed: `model_unsupported`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(home), local_files_only=True)
    except (OSError, ValueError) as e:
        raise errors.refuse(
            "model_unsupported", "model", f"its tokenizer does not load: {str(e)[:300]}"
        ) from e
    return TextCodec(tokenizer)


def _ascending(offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Offsets that never decrease: tokens that the tokenizer itself adds, at (0, 0), move to where they stand."""
    ends = accumulate((stop for _, stop in offsets), max)
    return tuple(o if o[0] < o[1] else (end, end) for o, end in zip(offsets, ends, strict=True))


def _placeholder(index: int) -> str:
    """Letters that every tokenizer knows and no template looks for."""
    return f"Zq{index}qZ"


def _places(text: str, frame: str, contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each content stands in the text, by message; None unless `frame` around them is exactly `text`."""
    named = {i: _placeholder(i) for i, content in enumerate(contents) if content}
    if any(frame.count(name) != 1 for name in named.values()):
        return None
    order = sorted(named, key=lambda i: frame.index(named[i]))
    between, rest = [], frame
    for i in order:
        before, _, rest = rest.partition(named[i])
        between.append(before)
    first, *after = [*between, rest]
    places, cursor = [(0, 0)] * len(contents), len(first)
    for i, follows in zip(order, after, strict=True):
        kept = next((c for c in _trims(contents[i]) if text.startswith(c + follows, cursor)), None)
        if kept is None:
            return None
        places[i] = (cursor, cursor + len(kept))
        cursor += len(kept) + len(follows)
    return places if text.startswith(first) and cursor == len(text) else None


def _trims(content: str) -> Iterator[str]:
    """What a template may leave of a message, longest first."""
    yield content
    yield content.rstrip()
    yield content.lstrip()
    yield content.strip()


def _bounds(marks: Marks, start: int, stop: int) -> tuple[int, int]:
    tokens = marks.tokens(start, stop)
    return (tokens[0], tokens[-1] + 1) if tokens else (0, 0)


def _copy(tokenizer: Any) -> Any:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    return core
