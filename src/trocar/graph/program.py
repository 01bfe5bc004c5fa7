"""What is sent: a program, and how text is generated after the prompts.

`Node` is the closed union of everything in `ops`; the discriminator is `op`. List order is evaluation order.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Self

from pydantic import Field, model_validator

from trocar import strict
from trocar.graph import ops
from trocar.strict import Strict

MAX_NODES = 5000
MAX_NEW_TOKENS = 1024

Node = Annotated[
    ops.Read
    | ops.Tensor
    | ops.Vector
    | ops.Stored
    | ops.Sae
    | ops.Add
    | ops.Sub
    | ops.Scale
    | ops.Dot
    | ops.MatMul
    | ops.Norm
    | ops.Normalize
    | ops.Relu
    | ops.TopK
    | ops.Mean
    | ops.Encode
    | ops.Eq
    | ops.Gt
    | ops.Lt
    | ops.And
    | ops.Or
    | ops.Not
    | ops.Where
    | ops.EditAdd
    | ops.EditSet
    | ops.EditScale
    | ops.EditProjectOut
    | ops.EditAffine
    | ops.EditClamp
    | ops.EditSae
    | ops.EditKnockout
    | ops.Capture
    | ops.Lens
    | ops.Logprobs
    | ops.Score
    | ops.Metric
    | ops.Pattern
    | ops.Raw
    | ops.Text
    | ops.StopAfter,
    Field(discriminator="op"),
]


class Generation(Strict):
    """How tokens are generated after each prompt.

    Attributes:
        max_new_tokens: 0 for a plain forward pass.
        temperature: 0 is greedy.
        top_p: nucleus, used when temperature is above 0 (Holtzman et al. 2020).
        seed: of the sampler; each prompt has its own stream, whatever the batch. Greedy choice has no use for it.
        stop_at_eos: whether the model's end tokens end a generation.
    """

    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] = 0
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    stop_at_eos: bool = True

    @model_validator(mode="after")
    def _no_idle_nucleus(self) -> Self:
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise ValueError("top_p has no effect at temperature 0; set a temperature or leave top_p out")
        return self


class Program(Strict):
    """A typed graph of reads, edits and outputs."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    nodes: Annotated[tuple[Node, ...], Field(min_length=1, max_length=MAX_NODES)]

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return hashlib.sha256(canonical(self)).hexdigest()


def canonical(model: Strict) -> bytes:
    """Canonical JSON of a strict model: sorted keys, no spaces."""
    return json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def json_schema() -> dict[str, object]:
    """JSON Schema of `Program`."""
    return strict.schema(Program)
