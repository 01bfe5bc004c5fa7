"""From a request to something an engine can run: tokens, handles, the check. Nothing is spent here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.engine.protocol import F32, Engine
from trocar.graph import check, ops
from trocar.graph.canonical import canonical_sites
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.graph.positions import NO_MARKS, Marks
from trocar.graph.program import Program, canonical
from trocar.graph.rules_values import arrays
from trocar.graph.scope import Scope
from trocar.models.load import Loaded
from trocar.store import Reader, Store
from trocar.wire.requests import Chat, RunRequest

Vectors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model with its engine."""

    loaded: Loaded
    engine: Engine

    @property
    def facts(self) -> ModelFacts:
        return self.engine.facts


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request with its tokens and a digest of everything that determines its result."""

    request: RunRequest
    checked: check.Checked
    tokens: tuple[tuple[int, ...], ...]
    vectors: Vectors
    digest: str


def prepare(
    request: RunRequest, vectors: Vectors, served: Served, store: Store, owner: str, prices: Prices
) -> Prepared:
    """Tokenises, looks handles up and checks.

    Raises:
        ProgramError: everything the checker finds.
    """
    marked = _marked(request, served)
    tokens = tuple(tokens for tokens, _ in marked)
    scope = Scope(
        model=served.facts,
        lengths=tuple(len(t) for t in tokens),
        generation=request.generation,
        tensors={name: tuple(v.shape) for name, v in vectors.items()},
        handles=_handles(request.program, store, owner),
        encode=served.loaded.tokenize,
        marks=tuple(marks for _, marks in marked),
    )
    checked = check.check(canonical_sites(request.program, served.facts), scope, prices)
    return Prepared(request, checked, tokens, vectors, _digest(request, vectors))


def _marked(request: RunRequest, served: Served) -> list[tuple[tuple[int, ...], Marks]]:
    """Tokens and marks of every prompt."""
    for name, rows in request.masks.items():
        if len(rows) != len(request.prompts):
            raise errors.refuse(
                "bad_value", f"masks.{name}", f"{len(rows)} rows for {len(request.prompts)} prompts",
                next_step="Send one row per prompt, with one entry per token.",
            )  # fmt: skip
    found = [_tokens(p, i, served) for i, p in enumerate(request.prompts)]
    if not request.masks:
        return found
    masks = [
        dict(zip(request.masks, rows, strict=True)) for rows in zip(*request.masks.values(), strict=True)
    ]
    return [(t, replace(marks, masks=m)) for (t, marks), m in zip(found, masks, strict=True)]


def _tokens(
    prompt: str | tuple[int, ...] | Chat, index: int, served: Served
) -> tuple[tuple[int, ...], Marks]:
    path = f"prompts[{index}]"
    if isinstance(prompt, str):
        text = served.loaded.text.mark_prompt(prompt, path=path)
        return tuple(text.ids), text.marks
    if isinstance(prompt, Chat):
        messages = [m.model_dump() for m in prompt.messages]
        chat = served.loaded.text.mark_chat(messages, path=f"{path}.messages")
        return tuple(chat.ids), chat.marks
    outside = next((t for t in prompt if t >= served.facts.vocab_size), None)
    if outside is not None:
        raise errors.refuse("unknown_token", path, f"token id {outside} is outside the vocabulary")
    return prompt, NO_MARKS


def _digest(request: RunRequest, vectors: Vectors) -> str:
    digest = hashlib.sha256(canonical(request))
    for name in sorted(vectors):
        digest.update(f"{name!r}{vectors[name].shape}".encode() + vectors[name].tobytes())
    return digest.hexdigest()


def named_handles(program: Program) -> tuple[str, ...]:
    """Every handle that a program names."""
    found = [n.handle for n in program.nodes if isinstance(n, ops.Vector | ops.Stored)]
    found += [n.probe for n in program.nodes if isinstance(n, ops.Score) and n.probe is not None]
    return tuple(dict.fromkeys(found))


def _handles(program: Program, store: Store, owner: str) -> dict[str, HandleFacts]:
    """Facts of the handles that exist and belong to the owner; the checker refuses the others."""
    found = {}
    for handle in named_handles(program):
        try:
            found[handle] = handle_facts(handle, store, owner)
        except errors.NotFound:
            continue
    return found


def handle_facts(handle: str, store: Store, owner: str) -> HandleFacts:
    """What the checker may know of a handle.

    Raises:
        NotFound: `handle_not_found`.
    """
    if handle.startswith("act_"):
        reader = store.open(owner, handle)
        return HandleFacts(
            handle=handle,
            kind="activations",
            fingerprint=reader.info.fingerprint,
            widths=dict(reader.info.widths),
            rows_per_prompt=reader.rows_per_prompt(),
        )
    artifact = store.open_artifact(owner, handle)
    return HandleFacts(
        handle=handle,
        kind="artifact",
        fingerprint=artifact.info.fingerprint,
        widths={site: int(a["direction"].shape[0]) for site, a in artifact.arrays.items()},
        has_probe=all("weights" in a for a in artifact.arrays.values()),
    )


def vector_values(prepared: Prepared, store: Store, owner: str) -> dict[str, F32]:
    """Float32 [width] or [rows, columns] of every `tensor` and `vector` node; arrays of an `sae` node under
    `id.w_enc` and so on."""
    out: dict[str, F32] = {}
    for node in prepared.checked.program.nodes:
        if isinstance(node, ops.Tensor):
            out[node.id] = prepared.vectors[node.name]
        elif isinstance(node, ops.Sae):
            out |= {f"{node.id}.{field}": prepared.vectors[name] for field, name in arrays(node).items()}
        elif isinstance(node, ops.Vector):
            out[node.id] = (
                store.open_artifact(owner, node.handle).arrays[node.site][node.part].astype(np.float32)
            )
    return out


def stored_values(prepared: Prepared, store: Store, owner: str) -> dict[str, tuple[F32, ...]]:
    """Float32 [rows, width] per prompt of every `stored` node."""
    out: dict[str, tuple[F32, ...]] = {}
    for node in prepared.checked.program.nodes:
        if isinstance(node, ops.Stored):
            reader = store.open(owner, node.handle)
            out[node.id] = _rows_of(reader, node.site, prepared.checked.stored[node.id])
    return out


def _rows_of(reader: Reader, site: str, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[F32, ...]:
    """Of each pair: those rows of that stored prompt. Prompts that nobody wants are not read."""
    counts = reader.rows_per_prompt()
    needed = sorted({prompt for prompt, rows in wanted if rows})
    starts = dict(zip(needed, np.cumsum([0, *(counts[p] for p in needed)]).tolist(), strict=False))
    data = reader.read(site, needed)
    return tuple(data[starts.get(prompt, 0) + np.array(rows, dtype=np.int64)] for prompt, rows in wanted)


def probe_values(prepared: Prepared, store: Store, owner: str) -> dict[str, tuple[F32, float]]:
    """(weights [width], bias) of every `score` node that names a probe."""
    out: dict[str, tuple[F32, float]] = {}
    for node in prepared.checked.program.nodes:
        if isinstance(node, ops.Score) and node.probe is not None and node.site is not None:
            arrays = store.open_artifact(owner, node.probe).arrays[node.site]
            out[node.id] = (arrays["weights"].astype(np.float32), float(arrays["bias"][0]))
    return out
