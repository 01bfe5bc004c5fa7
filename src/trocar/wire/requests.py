"""What a client sends. Strict models; vectors ride beside them in a frame (`wire.tensors`)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from trocar.graph.program import Generation, Program
from trocar.graph.sweep import Axis
from trocar.graph.words import HandleText, SiteText
from trocar.strict import Strict

MAX_TEXT = 200_000
MAX_WAIT_S: Final = 30.0
TokenIds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=2**31)], ...], Field(max_length=65_536, fail_fast=True)
]


class Message(Strict):
    """One turn of a conversation."""

    role: Annotated[str, Field(max_length=32)]
    content: Annotated[str, Field(max_length=MAX_TEXT)]


class Chat(Strict):
    """A conversation; the server applies the model's own template and asks for the assistant's turn."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=256, fail_fast=True)]


Prompt = Annotated[str, Field(max_length=MAX_TEXT)] | TokenIds | Chat
Name = Annotated[str, Field(min_length=1, max_length=200)]
Label = bool | int | Annotated[float, Field(ge=-1e9, le=1e9)]
Group = Annotated[int, Field(ge=-(2**53), le=2**53)] | Annotated[str, Field(max_length=200)]
FitKind = Literal["logistic", "mean_diff", "ridge", "lda", "multinomial", "linear_map"]
MOST_FOLDS: Final = 20
Labels = Annotated[tuple[Label, ...], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
MaskName = Annotated[str, Field(min_length=1, max_length=200)]
Mask = Annotated[tuple[bool, ...], Field(max_length=65_536, fail_fast=True)]
Masks = Annotated[
    dict[MaskName, Annotated[tuple[Mask, ...], Field(max_length=4096, fail_fast=True)]], Field(max_length=64)
]


class RunRequest(Strict):
    """A program with the prompts it runs on.

    Attributes:
        model: name of a served model.
        prompts: texts, or token ids, one program for all of them.
        program: the typed graph.
        generation: how tokens are generated after each prompt.
        masks: by name, for each prompt and each of its tokens, whether `mask("name")` selects it.
        sweep: axes whose product the program runs over.
    """

    model: Name
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=4096, fail_fast=True)]
    program: Program
    generation: Generation = Generation()
    masks: Masks = Field(default_factory=dict)
    sweep: Annotated[tuple[Axis, ...], Field(max_length=8, fail_fast=True)] = ()


class SessionRequest(Strict):
    """Programs that run one after another in one job; a later one may use what an earlier one captured.

    In step 1 and after, a `stored` node names the capture `kept` of step 0 as the handle `step0.kept`. An array
    that step i names `v` rides beside the request under the name `stepi.v`.

    Attributes:
        steps: requests to one model.
        keep: whether captures stay as handles; otherwise they are deleted when the session ends.
    """

    steps: Annotated[tuple[RunRequest, ...], Field(min_length=1, max_length=16, fail_fast=True)]
    keep: bool = False


class FitRequest(Strict):
    """A fit on stored rows; it runs where the rows are.

    Attributes:
        handle: activations to fit on; every captured site is fitted.
        kind: `linear_map` is fitted to the rows of another handle, every other kind to labels.
        labels: one per prompt, in prompt order (per row when each prompt has one row, the usual case).
        target: of a linear map, the handle whose rows are fitted to, as many as `handle` has.
        target_site: which of its sites.
        groups: rows of one group never stand on both sides of the split, one per prompt.
        test_fraction: part of the prompts held out.
        l2: strength of the penalty; None for the fit's default.
        l1: of `logistic`, strength of the penalty of absolute weights.
        class_weight: of `logistic` and `multinomial`, whether every class counts the same, however rare it is.
        folds: of a cross-validation over all rows, beside the held-out split; 0 for none.
    """

    handle: HandleText
    kind: FitKind
    labels: Labels | None = None
    target: HandleText | None = None
    target_site: SiteText | None = None
    groups: Annotated[tuple[Group, ...], Field(min_length=1, max_length=1_000_000, fail_fast=True)] | None = (
        None
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    l2: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    l1: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    class_weight: Literal["balanced"] | None = None
    folds: Annotated[int, Field(ge=0, le=MOST_FOLDS)] = 0


class TokenizeRequest(Strict):
    """Texts to tokenise as the model would."""

    model: Name
    texts: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_TEXT)], ...],
        Field(min_length=1, max_length=256, fail_fast=True),
    ]
