"""Text to tokens and back, with special tokens that only the server can spell.

User text is plain text: `<|im_end|>` typed by a user becomes several ordinary tokens. Chat goes through the
model's own template, whose special tokens are real; a message that contains the spelling of an added token is
refused rather than changed. Two private copies of the tokenizer's core are used and never reconfigured,
because the library's own `split_special_tokens=True` flips a switch on the shared one and races.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from tokenizers import Tokenizer

from trocar import errors

Message = Mapping[str, str]


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
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}

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
        spelt = next((name for name in self._special if name in text), None)
        if spelt is not None:
            raise errors.refuse("special_token_text", path, f"the text spells the special token {spelt!r}")
        ids: list[int] = self._plain.encode(text, add_special_tokens=True).ids
        return ids

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
        if not self._tokenizer.chat_template:
            reason = "this model has no chat template"
            raise errors.refuse("bad_value", path, reason, next_step="Send a prompt instead of messages.")
        if not messages:
            raise errors.refuse("empty_prompt", path, "there is no message")
        for i, message in enumerate(messages):
            self._check_message(message, f"{path}[{i}]")
        ids = self._render(messages, path)
        harmless = [{k: v and "x" if k == "content" else v for k, v in m.items()} for m in messages]
        if self._specials(ids) != self._specials(self._render(harmless, path)):
            reason = "a message, put into the chat template, would spell a special token of this model"
            raise errors.refuse("bad_value", path, reason)
        return ids

    def _render(self, messages: Sequence[Message], path: str) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as e:
            raise errors.refuse(
                "bad_value", path, f"the chat template refuses this: {str(e)[:200]}"
            ) from None
        ids: list[int] = self._real.encode(text, add_special_tokens=False).ids
        return ids

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


def _copy(tokenizer: Any) -> Any:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    return core
