"""What a trace is made on, as a user writes it: texts, token ids or conversations, and how text is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trocar import errors, strict
from trocar.graph.program import Generation
from trocar.wire.requests import Chat, Message, Prompt

Prompts = (
    str
    | Sequence[str]
    | Sequence[Sequence[int]]
    | Sequence[Mapping[str, str]]
    | Sequence[Sequence[Mapping[str, str]]]
)


def prompt_tuple(prompts: Prompts) -> tuple[Prompt, ...]:
    """Texts, lists of token ids, or conversations, as the wire wants them.

    One text is one prompt; a list of `{"role": ..., "content": ...}` is one conversation.
    """
    if isinstance(prompts, str):
        return (prompts,)
    if prompts and isinstance(prompts[0], Mapping):
        return (_prompt(prompts),)
    return tuple(_prompt(p) for p in prompts)


def is_single(prompts: Prompts) -> bool:
    """Whether one prompt was given alone, not in a list: a text, or one conversation."""
    return isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], Mapping))


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        return Chat(messages=tuple(strict.make(Message, **m) for m in prompt))
    return tuple(int(i) for i in prompt)


def generation_of(fields: dict[str, Any]) -> Generation:
    """Builds `Generation`, refusing a misspelt keyword with the closest one."""
    for name in fields:
        if name not in Generation.model_fields:
            near = errors.closest(name, Generation.model_fields)
            raise errors.refuse(
                "bad_argument", name, f"{name!r} is not an option of a generation", closest=near
            )
    return strict.make(Generation, **fields)
