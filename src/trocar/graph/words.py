"""The types of a node's fields: names, selectors, numbers and tokens, each with its bounds.

Kinds of values: a `vector` [D] is one for the request, `per_prompt` [D] one per prompt, `rows` [D] one per token that
is selected. `scalars` and `mask` are one number, or one truth value, per selected token; `prompt_scalars` and
`prompt_mask` one per prompt. `matrix` and `dictionary` are constants.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trocar.strict import Strict

Id = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.\-]{0,63}$")]
Ref = Id
SiteText = Annotated[str, Field(max_length=160)]
At = Annotated[str, Field(max_length=400)]
HandleText = Annotated[
    str, Field(pattern=r"^((act|art)_[0-9a-f]{32}|step[0-9]{1,2}\.[A-Za-z_][A-Za-z0-9_.\-]{0,63})$")
]
Real = Annotated[float, Field(ge=-1e6, le=1e6)]
Token = int | Annotated[str, Field(min_length=1, max_length=200)]
Tokens = Annotated[tuple[Token, ...], Field(min_length=1, max_length=20, fail_fast=True)]
TokenLists = Tokens | Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=4096, fail_fast=True)]
Refs = Annotated[tuple[Ref, ...], Field(min_length=1, max_length=512, fail_fast=True)]
TensorName = Annotated[str, Field(min_length=1, max_length=64)]
Index = Annotated[int, Field(ge=0, le=2**24)]
Heads = Annotated[tuple[Index, ...], Field(min_length=1, max_length=512, fail_fast=True)]
Neurons = Annotated[tuple[Index, ...], Field(min_length=1, max_length=4096, fail_fast=True)]
Unit = Literal["absolute", "site_norm"]


class Feature(Strict):
    """One feature's new activation: `set` to a number, or `scale`d by one."""

    index: Index
    set: Real | None = None
    scale: Real | None = None
