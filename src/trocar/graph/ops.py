"""The nodes of a program: what a researcher may say. Frozen data, nothing executable.

Every node has an `id`; operands name earlier nodes by id, so a cycle cannot be written. Nodes carry only
what crosses the network; what is legal and what it costs stands in `spec`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trocar.strict import Strict

Id = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.\-]{0,63}$")]
Ref = Id
SiteText = Annotated[str, Field(max_length=80)]
At = Annotated[str, Field(max_length=80)]
HandleText = Annotated[str, Field(pattern=r"^(act|art)_[0-9a-f]{32}$")]
Real = Annotated[float, Field(ge=-1e6, le=1e6)]
Token = int | Annotated[str, Field(min_length=1, max_length=200)]
Tokens = Annotated[tuple[Token, ...], Field(min_length=1, max_length=20, fail_fast=True)]
Refs = Annotated[tuple[Ref, ...], Field(min_length=1, max_length=512, fail_fast=True)]
ZERO = "zero"
# Words that stand for something else where ids stand: in `edit.set`, and in a cost beside the outputs.
RESERVED = frozenset({ZERO, "overhead", "receipts", "lengths"})


class Node(Strict):
    id: Id


class Read(Node):
    """The rows of a site: after the edits of that site that stand before it in the list, and after every
    edit of an earlier site, wherever that stands."""

    op: Literal["read"] = "read"
    site: SiteText
    at: At = "all"


class Tensor(Node):
    """A vector that the request carries, by name."""

    op: Literal["tensor"] = "tensor"
    name: Annotated[str, Field(min_length=1, max_length=64)]


class Vector(Node):
    """A direction, or the weights, that a fit left on the server."""

    op: Literal["vector"] = "vector"
    handle: HandleText
    site: SiteText
    part: Literal["direction", "weights"] = "direction"


class Stored(Node):
    """Rows captured before, aligned with this request's prompts by index."""

    op: Literal["stored"] = "stored"
    handle: HandleText
    site: SiteText


class Add(Node):
    """a + b, row by row."""

    op: Literal["add"] = "add"
    a: Ref
    b: Ref


class Sub(Node):
    """a - b, row by row."""

    op: Literal["sub"] = "sub"
    a: Ref
    b: Ref


class Scale(Node):
    """A value times a number."""

    op: Literal["scale"] = "scale"
    of: Ref
    by: Real


class Dot(Node):
    """The inner product of rows with a vector or with other rows: one number per row."""

    op: Literal["dot"] = "dot"
    a: Ref
    b: Ref


class Mean(Node):
    """The mean over the selected positions of each prompt: one row per prompt."""

    op: Literal["mean"] = "mean"
    of: Ref


class EditAdd(Node):
    """h + coef * value at the selected rows."""

    op: Literal["edit.add"] = "edit.add"
    site: SiteText
    at: At = "all"
    value: Ref
    coef: Real = 1.0


class EditSet(Node):
    """The selected rows become `value` (or zeros, with `"zero"`)."""

    op: Literal["edit.set"] = "edit.set"
    site: SiteText
    at: At = "all"
    value: Ref


class EditScale(Node):
    """h * by at the selected rows."""

    op: Literal["edit.scale"] = "edit.scale"
    site: SiteText
    at: At = "all"
    by: Real


class EditProjectOut(Node):
    """h - (h.v)v / (v.v): removes the component along `value` at the selected rows."""

    op: Literal["edit.project_out"] = "edit.project_out"
    site: SiteText
    at: At = "all"
    value: Ref


class Capture(Node):
    """Writes the rows to the store; what comes back is a handle."""

    op: Literal["capture"] = "capture"
    of: Refs


class Lens(Node):
    """The model's own last norm and unembedding applied to rows: top-k tokens with log-probabilities."""

    op: Literal["lens"] = "lens"
    of: Refs
    top_k: Annotated[int, Field(ge=1, le=20)] = 5


class Logprobs(Node):
    """Log-probabilities of named next tokens after the selected rows; one list, or one list per prompt."""

    op: Literal["logprobs"] = "logprobs"
    at: At = "prompt[-1]"
    tokens: Tokens | Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=4096, fail_fast=True)]


class Score(Node):
    """One number per row: a `dot`, or the logit of a fitted probe on rows."""

    op: Literal["score"] = "score"
    of: Ref
    probe: HandleText | None = None
    site: SiteText | None = None


class Text(Node):
    """The generated text and its tokens."""

    op: Literal["text"] = "text"
