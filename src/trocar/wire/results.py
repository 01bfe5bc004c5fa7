"""What a server answers. `Public` models hold only what follows from requests and policy; `Output` models
hold what came out of the model, and leave only through the gate, which quantises and counts them.

Numbers in outputs are lists indexed as their docstrings say; `prompts` and `positions` name each row.
Positions are absolute: a position at or beyond the prompt's length is a generated token.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trocar.graph.cost import Cost
from trocar.strict import Strict

JobState = Literal["QUEUED", "RUNNING", "RELEASING", "COMPLETED", "FAILED", "CANCELLED"]
FINAL: tuple[JobState, ...] = ("COMPLETED", "FAILED", "CANCELLED")


class Public(Strict):
    """Base of answers that hold nothing of the model's computation."""


class RefusalView(Strict):
    code: str
    path: str
    reason: str
    next_step: str
    closest: str | None
    docs: str


class BudgetView(Strict):
    """Budget of the calling key for one lineage; None means counted, not capped.

    Attributes:
        limit_bits: for life.
        left_bits: what can be reserved now: the least that key, project, token and lineage have left, for life and
            for today.
        day_limit_bits: for a day.
    """

    tier: str
    limit_bits: int | None
    spent_bits: int
    left_bits: int | None
    day_limit_bits: int | None = None


class PlanView(Public):
    """What a program would do and cost, priced before anything runs.

    Attributes:
        prompts: number of prompts.
        lengths: tokens of each prompt.
        cost: static cost.
        outputs: `(id, op, declassifier, bits)` per output, over all variants of a sweep.
        edits: `(id, op, site, selector, rows)` per edit, of a sweep's first variant; rows of generated tokens
            are an upper bound.
        admitted: whether the budget has room.
        variants: programs that run: 1 without a sweep.
    """

    model: str
    prompts: int
    lengths: tuple[int, ...]
    program_digest: str
    cost: Cost
    outputs: tuple[OutputPlan, ...]
    edits: tuple[EditPlan, ...]
    budget: BudgetView
    admitted: bool
    variants: int = 1


class OutputPlan(Strict):
    id: str
    op: str
    leaves_as: str
    bits: int


class EditPlan(Strict):
    id: str
    op: str
    site: str
    at: str
    rows: int


class JobView(Public):
    """State of a job. `refusals` is set when it FAILED."""

    job: str
    kind: Literal["run", "fit", "session"]
    state: JobState
    done: int
    total: int
    ahead: int
    elapsed_s: float
    refusals: tuple[RefusalView, ...] = ()


class HandleView(Public):
    """A handle that the caller owns; its rows stay on the server."""

    handle: str
    kind: Literal["activations", "artifact"]
    model: str
    fingerprint: str
    sites: tuple[str, ...]
    widths: dict[str, int]
    rows: int
    bytes: int
    dtype: str
    created: str


class HandlesView(Public):
    handles: tuple[HandleView, ...]
    stored_bytes: int


class TokensView(Public):
    """Token ids and their texts; a tokenizer is public."""

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, ...], ...]


class LedgerEntryView(Strict):
    seq: int
    kind: str
    bits: int
    time: str


class LedgerView(Public):
    """The calling key's own account."""

    key: str
    budgets: dict[str, BudgetView]
    entries: tuple[LedgerEntryView, ...]
    head: str


class ErasedView(Public):
    handle: str
    erased: bool


# ---- what leaves through the gate -----------------------------------------------------------------


class LensOutput(Strict):
    """Top-k next tokens: `ids`, `texts`, `logprobs` are indexed [value][row][k]; values are named in `names`."""

    kind: Literal["lens"] = "lens"
    names: tuple[str, ...]
    prompts: tuple[int, ...]
    positions: tuple[int, ...]
    ids: tuple[tuple[tuple[int, ...], ...], ...]
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    logprobs: tuple[tuple[tuple[float, ...], ...], ...]


class LogprobsOutput(Strict):
    """Log-probabilities (nats) of named tokens, [row][token]; `ids` and `texts` are [prompt][token]."""

    kind: Literal["logprobs"] = "logprobs"
    prompts: tuple[int, ...]
    positions: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


class ScoreOutput(Strict):
    """One number per row, [row]; `truth` says that they are truth values, 0 or 1, which cost a bit each."""

    kind: Literal["score"] = "score"
    prompts: tuple[int, ...]
    positions: tuple[int, ...]
    scores: tuple[float, ...]
    truth: bool = False


class MetricOutput(Strict):
    """One number per prompt, [prompt]."""

    kind: Literal["metric"] = "metric"
    metric: Literal["logit_diff", "cross_entropy", "kl"]
    values: tuple[float, ...]


class PatternOutput(Strict):
    """Attention probabilities, [row][head][key]; `heads` are head indices, `keys` absolute positions by prompt."""

    kind: Literal["pattern"] = "pattern"
    prompts: tuple[int, ...]
    positions: tuple[int, ...]
    heads: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]
    probs: tuple[tuple[tuple[float, ...], ...], ...]


class RawRows(Strict):
    """Rows of one value.

    Attributes:
        data: base64 of whole numbers of `bits` bits, row after row, or of little-endian float32 at 32 bits
            (`wire.packing`).
        scales: of each row; empty at 32 bits.
    """

    site: str
    width: int
    data: str
    scales: tuple[float, ...]


class RawOutput(Strict):
    """Rows as they are, of each value by its id."""

    kind: Literal["raw"] = "raw"
    prompts: tuple[int, ...]
    positions: tuple[int, ...]
    bits: int
    values: dict[str, RawRows]


class TextOutput(Strict):
    """Generated text and token ids per prompt; `finished` says whether an end token came."""

    kind: Literal["text"] = "text"
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]


class CaptureOutput(Strict):
    """A handle to rows that stayed on the server."""

    kind: Literal["capture"] = "capture"
    handle: str
    sites: tuple[str, ...]
    widths: dict[str, int]
    rows: int
    bytes: int
    rows_per_prompt: tuple[int, ...]


class SiteMetrics(Strict):
    """Metrics of a fit at one site; keys as in docs/fits.md."""

    site: str
    metrics: dict[str, float]


class FitOutput(Strict):
    """An artifact that stays on the server, and its metrics by site."""

    kind: Literal["fit"] = "fit"
    artifact: str
    fit: str
    fingerprint: str
    n_train: int
    n_test: int
    sites: tuple[SiteMetrics, ...]


Output = Annotated[
    LensOutput
    | LogprobsOutput
    | ScoreOutput
    | MetricOutput
    | PatternOutput
    | RawOutput
    | TextOutput
    | CaptureOutput
    | FitOutput,
    Field(discriminator="kind"),
]


class EditReceipt(Strict):
    """What an edit really did.

    Attributes:
        rows: rows written.
        norm_before: mean Euclidean norm of those rows before the edit.
        norm_after: and after it.
    """

    id: str
    op: str
    site: str
    rows: int
    norm_before: float
    norm_after: float


class Precision(Strict):
    """How numbers left.

    Attributes:
        scalar_bits: of a number; 32 is a float32, less are steps of the largest number of its output.
        vector_bits: of a number of a raw row.
        logprob_step: distance of neighbouring log-probabilities in nats; 0 when they are not rounded.
        logprob_floor: the lowest log-probability that is told apart: it stands for everything below; None when
            they are not rounded.
    """

    scalar_bits: int
    vector_bits: int
    logprob_step: float
    logprob_floor: float | None


class Receipt(Strict):
    """What ran: enough to cite and to repeat."""

    model: str
    fingerprint: str
    engine: str
    dtype: str
    program_digest: str
    request_digest: str
    seed: int
    edits: tuple[EditReceipt, ...]
    released_bits: dict[str, int]
    reserved_bits: int
    precision: Precision


class VariantResult(Strict):
    """What one variant of a sweep released.

    Attributes:
        settings: values by `node.field`.
        edits: what its edits really did.
    """

    settings: dict[str, int | float | str]
    outputs: dict[str, Output]
    edits: tuple[EditReceipt, ...]


class RunResult(Strict):
    """Everything one request released. `tokens` are the prompts' token texts, [prompt][position].

    Attributes:
        outputs: by name; empty for a sweep.
        sweep: every variant of a sweep, the last axis changing fastest; absent when there is none.
    """

    outputs: dict[str, Output]
    tokens: tuple[tuple[str, ...], ...]
    receipt: Receipt
    sweep: tuple[VariantResult, ...] = ()


class SessionResult(Strict):
    """What the steps of a session released, in order."""

    steps: tuple[RunResult, ...]


class Charge(Public):
    """The ledger's answer to a release."""

    bits: int
    seq: int
    head: str
    left_bits: int | None
    replayed: bool = False


PlanView.model_rebuild()
