"""Static cost of a program: a function of the request and public policy alone, known before anything runs.

Bits are what may leave at most. Every output op counts its own; rows of generated tokens tell how many tokens
each prompt gave (`lengths`); each edit's receipt counts two norms; each admitted request counts an overhead
for its status, length and timing. Nothing here depends on activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trocar.graph import ops
from trocar.graph.facts import ModelFacts
from trocar.graph.labels import FREE, Rules
from trocar.graph.scope import Walk
from trocar.graph.shapes import Value
from trocar.strict import Strict

STORED_BYTES_PER_NUMBER: Final = 4
FLOAT_BITS: Final = 32
SCALE_BITS: Final = 16
SIDECAR_BYTES_PER_ROW: Final = 32
NORMS_PER_EDIT: Final = 2


@dataclass(frozen=True, slots=True)
class Prices:
    """Public prices of one caller on one model, and the structure rules that go with them.

    Attributes:
        scalar_bits: of one released number: 32 (a float32 as it is), or 4 to 16 (a step of a scale).
        overhead_bits: of one admitted request.
        vector_bits: of one number of a row that leaves as it is, under `raw`.
        rules: what may leave at all.
    """

    scalar_bits: int
    overhead_bits: int
    vector_bits: int = 32
    rules: Rules = FREE

    @property
    def scale_bits(self) -> int:
        """Of the scale that numbers of one output share; a float32 needs none."""
        return 0 if self.scalar_bits == FLOAT_BITS else SCALE_BITS

    @property
    def row_scale_bits(self) -> int:
        """Of the scale that the numbers of one row share."""
        return 0 if self.vector_bits == FLOAT_BITS else SCALE_BITS

    @property
    def norm_bits(self) -> int:
        """Of one number that stands alone: a receipt's norm, a fit's metric."""
        return max(SCALE_BITS, self.scalar_bits)


class Cost(Strict):
    """What a program costs at most.

    Attributes:
        tokens: tokens that go through the model.
        rows_read: rows read at sites, over all prompts.
        flops: floating-point operations of the layers that are computed, of the unembedding and of dictionaries.
        bytes_stored: bytes that captures add to the store.
        bits_out: bits of each output, of edit receipts (`receipts`), of how many tokens each prompt gave
            (`lengths`, when rows of generated tokens are read) and of the request (`overhead`).
        total_bits: their sum: the reservation.
        download_bits: what the same activations would be as a bf16 download, for comparison.
    """

    tokens: int
    rows_read: int
    flops: int
    bytes_stored: int
    bits_out: dict[str, int]
    total_bits: int
    download_bits: int


def token_bits(model: ModelFacts) -> int:
    """Bits of one token id: ceil(log2 V)."""
    return (model.vocab_size - 1).bit_length()


def rows_of(value: Value, walk: Walk) -> int:
    """Upper bound of the rows of a value."""
    gen = walk.selections[value.at].gen_rows if value.gen and value.at is not None else 0
    return sum(value.counts) + gen * len(walk.scope.lengths)


def lens_bits(node: ops.Lens, walk: Walk, prices: Prices) -> int:
    each = token_bits(walk.scope.model) + prices.scalar_bits
    return sum(rows_of(walk.values[r], walk) for r in node.of) * node.top_k * each


def logprobs_bits(node: ops.Logprobs, walk: Walk, prices: Prices) -> int:
    return walk.selections[node.at].most_rows * len(walk.token_ids[node.id][0]) * prices.scalar_bits


def score_bits(node: ops.Score, walk: Walk, prices: Prices) -> int:
    """A truth value is one bit; numbers share a scale."""
    value = walk.values[node.of]
    if value.content == "truth":
        return rows_of(value, walk)
    return rows_of(value, walk) * prices.scalar_bits + prices.scale_bits


def metric_bits(_node: ops.Metric, walk: Walk, prices: Prices) -> int:
    return len(walk.scope.lengths) * prices.scalar_bits + prices.scale_bits


def raw_bits(node: ops.Raw, walk: Walk, prices: Prices) -> int:
    """Rows as they are, each with a scale of its own."""
    values = [walk.values[ref] for ref in node.of]
    return sum(rows_of(v, walk) * (v.width * prices.vector_bits + prices.row_scale_bits) for v in values)


def pattern_bits(node: ops.Pattern, walk: Walk, prices: Prices) -> int:
    """A row's width is its heads times its keys."""
    value = walk.values[node.of]
    return rows_of(value, walk) * value.width * prices.scalar_bits


def text_bits(_node: ops.Text, walk: Walk, _prices: Prices) -> int:
    """A prefix-free code: n tokens and an end mark per prompt."""
    per_prompt = walk.scope.generation.max_new_tokens + 1
    return len(walk.scope.lengths) * per_prompt * token_bits(walk.scope.model)


def capture_bits(_node: ops.Capture, _walk: Walk, _prices: Prices) -> int:
    """A handle is random; how many rows a generation gave is counted once, in `lengths`."""
    return 0


def lengths_bits(walk: Walk) -> int:
    """Per prompt a number of generated tokens, 0 to max_new_tokens: it shows in the rows that are read."""
    return (
        len(walk.scope.lengths) * walk.scope.generation.max_new_tokens.bit_length() if walk.reads_gen else 0
    )


def edit_bits(walk: Walk, prices: Prices) -> int:
    """Two norms, and how many rows of generated tokens were written over all prompts."""
    most = len(walk.scope.lengths) * walk.scope.generation.max_new_tokens
    return NORMS_PER_EDIT * prices.norm_bits + most.bit_length()


def pass_flops(walk: Walk, depth: int) -> int:
    """Of `depth` layers of the passes."""
    model = walk.scope.model
    return 2 * model.parameters * tokens(walk) * depth // model.n_layers


def _head_flops(rows: int, walk: Walk) -> int:
    model = walk.scope.model
    return 2 * model.d_model * model.vocab_size * rows


def lens_flops(node: ops.Lens, walk: Walk) -> int:
    """Of the unembedding of its rows."""
    return _head_flops(sum(rows_of(walk.values[r], walk) for r in node.of), walk)


def logprobs_flops(node: ops.Logprobs, walk: Walk) -> int:
    return _head_flops(walk.selections[node.at].most_rows, walk)


def metric_flops(node: ops.Metric, walk: Walk) -> int:
    """Of its rows, and of those of the distribution it is compared with."""
    return _head_flops(walk.selections[node.at].most_rows * (1 if node.to is None else 2), walk)


def matmul_flops(node: ops.MatMul, walk: Walk) -> int:
    a, b = walk.values[node.a], walk.values[node.b]
    return 2 * rows_of(a, walk) * b.height * b.width


def row_flops(node: ops.Node, walk: Walk) -> int:
    """Of arithmetic that goes once over the rows of its operands."""
    given = (getattr(node, name, None) for name in ("of", "a", "b", "by", "cond"))
    values = [walk.values[ref] for ref in given if isinstance(ref, str)]
    return 2 * sum(rows_of(v, walk) * v.width for v in values)


def edit_flops(node: ops.EditNode, walk: Walk) -> int:
    """Of a few passes over the rows that it writes; a low-rank map multiplies them twice."""
    rows, width = walk.selections[node.at].most_rows, walk.scope.model.width(walk.site(node.site, ""))
    rank = walk.values[node.down].width if isinstance(node, ops.EditAffine) else 1
    return 4 * rows * width * rank


def encode_flops(node: ops.Encode, walk: Walk) -> int:
    of, dictionary = walk.values[node.of], walk.values[node.sae]
    return 2 * rows_of(of, walk) * dictionary.width * dictionary.features


def sae_flops(node: ops.EditSae, walk: Walk) -> int:
    """Of encoding and decoding."""
    dictionary = walk.values[node.sae]
    return 4 * walk.selections[node.at].most_rows * dictionary.width * dictionary.features


def tokens(walk: Walk) -> int:
    return sum(walk.scope.lengths) + len(walk.scope.lengths) * walk.scope.generation.max_new_tokens


def stored_bytes(node: ops.Capture, walk: Walk) -> int:
    values = [walk.values[r] for r in node.of]
    rows = len(walk.scope.lengths) if node.reduce == "mean" else rows_of(values[0], walk)
    return rows * (sum(v.width for v in values) * STORED_BYTES_PER_NUMBER + SIDECAR_BYTES_PER_ROW)
