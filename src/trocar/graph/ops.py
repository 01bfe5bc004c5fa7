"""The nodes of a program: what a researcher may say. Frozen data, nothing executable.

Every node has an `id`; operands name earlier nodes by id, so a cycle cannot be written. What is legal and what it
costs stands in `spec`. Docstrings here are the reference that users see, and say exactly what is computed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trocar.graph.words import (
    At,
    Feature,
    HandleText,
    Heads,
    Id,
    Index,
    Neurons,
    Real,
    Ref,
    Refs,
    SiteText,
    TensorName,
    TokenLists,
    Unit,
)
from trocar.strict import Strict

ZERO = "zero"
RESERVED = frozenset({ZERO, "overhead", "receipts", "lengths"})  # where ids stand: in edit.set, and in a cost
MAX_RANK = 64


class Node(Strict):
    id: Id


class Pair(Node):
    a: Ref
    b: Ref


class Comparison(Node):
    a: Ref
    b: Real | Ref


class Read(Node):
    """The rows of a site: after the edits of that site that stand before it in the list, and after every edit of an
    earlier site, wherever that stands. `heads` keeps those heads of q, k, v or z (key/value heads for k and v);
    `neurons` keeps those columns of mlp_act. At attn_probs, a row is one query's attention: the probabilities on the
    `keys` (a selector of prompt tokens that selects equally many in every prompt) for each head, heads outermost."""

    op: Literal["read"] = "read"
    site: SiteText
    at: At = "all"
    heads: Heads | None = None
    neurons: Neurons | None = None
    keys: At | None = None


class Tensor(Node):
    """An array that the request carries, by name: a vector [D], or a matrix [rows, D]."""

    op: Literal["tensor"] = "tensor"
    name: TensorName


class Vector(Node):
    """A direction, or the weights, that a fit left on the server."""

    op: Literal["vector"] = "vector"
    handle: HandleText
    site: SiteText
    part: Literal["direction", "weights"] = "direction"


class Stored(Node):
    """Rows captured before. Prompt i of this request gets the rows of stored prompt i, or of `prompts[i]` where given;
    `at` selects among the stored rows of a prompt, as `prompt[...]` over their order."""

    op: Literal["stored"] = "stored"
    handle: HandleText
    site: SiteText
    prompts: Annotated[tuple[Index, ...], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    at: At = "prompt[*]"


class Sae(Node):
    """A sparse autoencoder from arrays that the request carries: f = act((h - b_dec) W_enc + b_enc) and h' = f W_dec +
    b_dec, with w_enc [D, F], b_enc [F], w_dec [F, D], b_dec [D]. Without `center` the input is h itself. `activation`:
    relu, topk (keeps the k largest of each row, after a relu) or jumprelu (keeps what is above threshold [F])
    (Cunningham et al. 2023; Gao et al. 2024; Rajamanoharan et al. 2024)."""

    op: Literal["sae"] = "sae"
    w_enc: TensorName
    b_enc: TensorName
    w_dec: TensorName
    b_dec: TensorName
    activation: Literal["relu", "topk", "jumprelu"] = "relu"
    k: Annotated[int, Field(ge=1, le=4096)] | None = None
    threshold: TensorName | None = None
    center: bool = True


class Add(Pair):
    """a + b, row by row."""

    op: Literal["add"] = "add"


class Sub(Pair):
    """a - b, row by row."""

    op: Literal["sub"] = "sub"


class Scale(Node):
    """A value times a number, or each row times its own number."""

    op: Literal["scale"] = "scale"
    of: Ref
    by: Real | Ref


class Dot(Pair):
    """The inner product of rows with a vector or with other rows: one number per row."""

    op: Literal["dot"] = "dot"


class MatMul(Pair):
    """Rows [D] times a matrix [D, R] that the request carries: rows [R], R at most 64."""

    op: Literal["matmul"] = "matmul"


class Norm(Node):
    """The Euclidean norm of each row: one number per row."""

    op: Literal["norm"] = "norm"
    of: Ref


class Normalize(Node):
    """Each row divided by its Euclidean norm; a row of zeros stays zero."""

    op: Literal["normalize"] = "normalize"
    of: Ref


class Relu(Node):
    """max(x, 0), number by number."""

    op: Literal["relu"] = "relu"
    of: Ref


class TopK(Node):
    """Each row with all but its k largest numbers set to zero; of equal numbers the first stays."""

    op: Literal["topk"] = "topk"
    of: Ref
    k: Annotated[int, Field(ge=1, le=4096)]


class Mean(Node):
    """The mean over the selected positions of each prompt, or with over="width" over the numbers of each row."""

    op: Literal["mean"] = "mean"
    of: Ref
    over: Literal["positions", "width"] = "positions"


class Encode(Node):
    """The feature activations [F] of rows under a dictionary."""

    op: Literal["encode"] = "encode"
    of: Ref
    sae: Ref


class Eq(Comparison):
    """a == b, number by number of scalars: a mask."""

    op: Literal["eq"] = "eq"


class Gt(Comparison):
    """a > b, number by number of scalars: a mask."""

    op: Literal["gt"] = "gt"


class Lt(Comparison):
    """a < b, number by number of scalars: a mask."""

    op: Literal["lt"] = "lt"


class And(Pair):
    """Both masks."""

    op: Literal["and"] = "and"


class Or(Pair):
    """Either mask."""

    op: Literal["or"] = "or"


class Not(Node):
    """Where the mask is false."""

    op: Literal["not"] = "not"
    of: Ref


class Where(Node):
    """Row by row: a where the mask is true, b where it is false."""

    op: Literal["where"] = "where"
    cond: Ref
    a: Ref
    b: Ref


class Edit(Node):
    """h' = h + gate * (f(h) - h) at the selected rows; without a gate h' = f(h). A gate is a mask, or numbers, for the
    same rows, or one per prompt. `heads` restricts the edit to those heads of q, k, v or z, `neurons` to those columns
    of mlp_act; a value then has their width."""

    site: SiteText
    at: At = "all"
    gate: Ref | None = None
    heads: Heads | None = None
    neurons: Neurons | None = None


class EditAdd(Edit):
    """h + coef * value at the selected rows. With unit="site_norm" the value is first made a unit vector, and coef
    counts in mean norms of the site's rows (measured at load)."""

    op: Literal["edit.add"] = "edit.add"
    value: Ref
    coef: Real = 1.0
    unit: Unit = "absolute"


class EditSet(Edit):
    """The selected rows become `value` (or zeros, with `"zero"`)."""

    op: Literal["edit.set"] = "edit.set"
    value: Ref


class EditScale(Edit):
    """h * by at the selected rows."""

    op: Literal["edit.scale"] = "edit.scale"
    by: Real


class EditProjectOut(Edit):
    """h - (h.v)v / (v.v): removes the component along `value` at the selected rows."""

    op: Literal["edit.project_out"] = "edit.project_out"
    value: Ref


class EditAffine(Edit):
    """h + (h D + inner) U + bias at the selected rows, with `down` D [D, r], `up` U [r, D], `inner` [r] and `bias`
    [D]; r at most 64 (a low-rank edit as in LoReFT, Wu et al. 2024)."""

    op: Literal["edit.affine"] = "edit.affine"
    down: Ref
    up: Ref
    inner: Ref | None = None
    bias: Ref | None = None


class EditClamp(Edit):
    """The component along `value` (made a unit vector) is kept within [low, high] at the selected rows; the rest of
    the row stays. With unit="site_norm" the bounds count in mean norms of the site's rows."""

    op: Literal["edit.clamp"] = "edit.clamp"
    value: Ref
    low: Real | None = None
    high: Real | None = None
    unit: Unit = "absolute"


class EditSae(Edit):
    """Features of a dictionary are set or scaled, f -> f'. With `keep_error` the row becomes h + (f' - f) W_dec, so
    what the dictionary does not reconstruct is kept; without, it becomes the decoded f'."""

    op: Literal["edit.sae"] = "edit.sae"
    sae: Ref
    features: Annotated[tuple[Feature, ...], Field(max_length=256, fail_fast=True)] = ()
    keep_error: bool = True


class EditKnockout(Node):
    """Cuts attention edges: at attn_probs, the queries `at` give no attention to the `keys` (prompt tokens) in the
    named heads (all without `heads`), and the rest of the pattern is renormalised (Geva et al. 2023)."""

    op: Literal["edit.knockout"] = "edit.knockout"
    site: SiteText
    at: At = "all"
    keys: At
    heads: Heads | None = None


class Capture(Node):
    """Stores the rows, or with reduce="mean" their mean over the selected positions of each prompt: gives a handle."""

    op: Literal["capture"] = "capture"
    of: Refs
    reduce: Literal["none", "mean"] = "none"


class Lens(Node):
    """The model's own last norm and unembedding applied to rows: top-k tokens with log-probabilities."""

    op: Literal["lens"] = "lens"
    of: Refs
    top_k: Annotated[int, Field(ge=1, le=20)] = 5


class Logprobs(Node):
    """Log-probabilities of named next tokens after the selected rows; one list, or one list per prompt."""

    op: Literal["logprobs"] = "logprobs"
    at: At = "prompt[-1]"
    tokens: TokenLists


class Score(Node):
    """One number per row: a `dot` or another number, a mask as 0 and 1, or the logit of a fitted probe on rows."""

    op: Literal["score"] = "score"
    of: Ref
    probe: HandleText | None = None
    site: SiteText | None = None


class Metric(Node):
    """One number per prompt, the mean over its selected rows. `logit_diff`: the logit of the first token minus that of
    the second, `tokens` being one pair or one pair per prompt. `cross_entropy`: minus the log-probability (nats) of
    the prompt token that follows. `kl`: the divergence KL(p || q) in nats of the model's next-token distribution q
    from the one p that rows `to` (of final_norm) give."""

    op: Literal["metric"] = "metric"
    metric: Literal["logit_diff", "cross_entropy", "kl"]
    at: At = "prompt[-1]"
    tokens: TokenLists | None = None
    to: Ref | None = None


class Pattern(Node):
    """Attention probabilities of a read at attn_probs: one number per query row, head and key."""

    op: Literal["pattern"] = "pattern"
    of: Ref


class Raw(Node):
    """Rows as they are, of whole sites, quantised to the tier's bits per number with a scale per row. Secret weights
    give none: capture the rows and work on the handle, or ask the airlock."""

    op: Literal["raw"] = "raw"
    of: Refs


class Text(Node):
    """The generated text and its tokens."""

    op: Literal["text"] = "text"


class StopAfter(Node):
    """Layers after `layer` are not computed; anything that would need them is refused."""

    op: Literal["stop_after"] = "stop_after"
    layer: Index


EditNode = EditAdd | EditSet | EditScale | EditProjectOut | EditAffine | EditClamp | EditSae | EditKnockout
OutputNode = Capture | Lens | Logprobs | Score | Metric | Pattern | Raw | Text
EDIT_NODES = (EditAdd, EditSet, EditScale, EditProjectOut, EditAffine, EditClamp, EditSae, EditKnockout)
OUTPUT_NODES = (Capture, Lens, Logprobs, Score, Metric, Pattern, Raw, Text)
