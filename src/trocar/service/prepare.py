"""From a request to something an engine can run: tokens, handles, the check. Nothing is spent here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.graph import ops, sweep
from trocar.graph.canonical import canonical_sites
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.graph.positions import NO_MARKS, Marks
from trocar.graph.program import Program, canonical
from trocar.graph.scope import Scope
from trocar.models.text import TextCodec
from trocar.strict import Strict
from trocar.wire.requests import Chat, RunRequest

Vectors = Mapping[str, npt.NDArray[np.float32]]


class Public(Protocol):
    """The public side of a model."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def text(self) -> TextCodec: ...


class Known(Protocol):
    """Facts of one handle."""

    def facts(self) -> HandleFacts: ...


class Shelf(Protocol):
    """Where a tenant's handles are looked up."""

    def find(self, tenant: str, handle: str) -> Known:
        """Raises `handle_not_found`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request with its tokens and a digest of everything that determines its result.

    Attributes:
        program: as it was sent, with canonical names of sites.
        variants: what runs: every variant of a sweep, or the program alone.
        fork: layers that all variants compute alike; 0 for one program.
        known: facts of the handles that the program names, by which it was checked.
        prices: by which it was checked.
    """

    request: RunRequest
    program: Program
    variants: tuple[sweep.Variant, ...]
    tokens: tuple[tuple[int, ...], ...]
    vectors: Vectors
    digest: str
    fork: int
    known: Mapping[str, HandleFacts]
    prices: Prices

    @property
    def cost(self) -> Cost:
        """What all variants cost together."""
        return sweep.cost(self.variants)

    @property
    def sequences(self) -> int:
        """Prompts that are run, over all variants."""
        return len(self.tokens) * len(self.variants)


def prepare(
    request: RunRequest,
    vectors: Vectors,
    model: Public,
    handles: Shelf,
    tenant: str,
    prices: Prices,
    promised: Mapping[str, HandleFacts] | None = None,
) -> Prepared:
    """Tokenises, looks handles up and checks.

    Args:
        promised: facts of handles that will exist when the request runs.

    Raises:
        ProgramError: everything the checker finds.
    """
    marked = _marked(request, model)
    tokens = tuple(tokens for tokens, _ in marked)
    known = {**_handles(request.program, handles, tenant), **(promised or {})}
    scope = Scope(
        model=model.facts,
        lengths=tuple(len(t) for t in tokens),
        generation=request.generation,
        tensors={name: tuple(v.shape) for name, v in vectors.items()},
        handles=known,
        encode=model.text.tokenize,
        marks=tuple(marks for _, marks in marked),
    )
    variants = sweep.variants(request.program, request.sweep, scope, prices)
    program = canonical_sites(request.program, model.facts)
    fork = sweep.fork_layer([v.checked.program for v in variants], model.facts.n_layers)
    return Prepared(
        request=request,
        program=program,
        variants=variants,
        tokens=tokens,
        vectors=vectors,
        digest=digest(request, vectors),
        fork=0 if len(variants) == 1 else fork,
        known=known,
        prices=prices,
    )


def _marked(request: RunRequest, model: Public) -> list[tuple[tuple[int, ...], Marks]]:
    """Tokens and marks of every prompt."""
    for name, rows in request.masks.items():
        if len(rows) != len(request.prompts):
            raise errors.refuse(
                "bad_value", f"masks.{name}", f"{len(rows)} rows for {len(request.prompts)} prompts",
                next_step="Send one row per prompt, with one entry per token.",
            )  # fmt: skip
    found = [_tokens(p, i, model) for i, p in enumerate(request.prompts)]
    if not request.masks:
        return found
    masks = [
        dict(zip(request.masks, rows, strict=True)) for rows in zip(*request.masks.values(), strict=True)
    ]
    return [(t, replace(marks, masks=m)) for (t, marks), m in zip(found, masks, strict=True)]


def _tokens(prompt: str | tuple[int, ...] | Chat, index: int, model: Public) -> tuple[tuple[int, ...], Marks]:
    path = f"prompts[{index}]"
    if isinstance(prompt, str):
        text = model.text.mark_prompt(prompt, path=path)
        return tuple(text.ids), text.marks
    if isinstance(prompt, Chat):
        messages = [m.model_dump() for m in prompt.messages]
        chat = model.text.mark_chat(messages, path=f"{path}.messages")
        return tuple(chat.ids), chat.marks
    outside = next((t for t in prompt if t >= model.facts.vocab_size), None)
    if outside is not None:
        raise errors.refuse("unknown_token", path, f"token id {outside} is outside the vocabulary")
    return prompt, NO_MARKS


def digest(request: Strict, vectors: Vectors) -> str:
    """SHA-256 of a request and of the arrays beside it, as hex."""
    found = hashlib.sha256(canonical(request))
    for name in sorted(vectors):
        found.update(f"{name!r}{vectors[name].shape}".encode() + vectors[name].tobytes())
    return found.hexdigest()


def named_handles(program: Program) -> tuple[str, ...]:
    """Every handle that a program names."""
    found = [n.handle for n in program.nodes if isinstance(n, ops.Vector | ops.Stored)]
    found += [n.probe for n in program.nodes if isinstance(n, ops.Score) and n.probe is not None]
    return tuple(dict.fromkeys(found))


def _handles(program: Program, handles: Shelf, tenant: str) -> dict[str, HandleFacts]:
    """Facts of the handles that exist and belong to the tenant; the checker refuses the others."""
    found = {}
    for handle in named_handles(program):
        try:
            found[handle] = handles.find(tenant, handle).facts()
        except errors.NotFound:
            continue
    return found
