"""`Released`: the only thing that may cross the network, and the only room that can make one.

What came out of a model is quantised here, counted here and charged here before it exists as bytes. What
follows from requests and policy alone (`Public` views, refusals) is wrapped here for nothing. Numbers leave
as floats of `scalar_bits` bits (1 sign, 8 exponent, the rest mantissa), so what is charged is what is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.graph.cost import Cost
from trocar.strict import Strict
from trocar.wire import results as r

_SEAL: Final = object()
_MANTISSA: Final = 23
_SIGN_AND_EXPONENT: Final = 9
_LARGEST: Final = 1e38
# What a request costs besides its outputs.
_SHARED: Final = ("overhead", "receipts", "lengths")
# The field that holds an output's numbers, nested or not.
_NUMBERS: Final[Mapping[type[r.Output], str]] = {
    r.LensOutput: "logprobs",
    r.LogprobsOutput: "logprobs",
    r.ScoreOutput: "scores",
    r.MetricOutput: "values",
    r.PatternOutput: "probs",
}


class Released:
    """Bytes that may leave, with what they cost. Made only by this module.

    Attributes:
        payload: canonical JSON.
        status: how the answer ends, as an HTTP status.
        charge: the ledger's entry, None for public answers.
        retry_after_s: when a refusal for lack of room may go through.
    """

    __slots__ = ("charge", "payload", "retry_after_s", "status")
    payload: bytes
    status: int
    charge: r.Charge | None
    retry_after_s: int | None

    def __init__(
        self,
        seal: object,
        payload: bytes,
        status: int,
        charge: r.Charge | None,
        retry_after_s: int | None = None,
    ) -> None:
        if seal is not _SEAL:
            raise TypeError("only trocar.gate.release makes Released values")
        named = {"payload": payload, "status": status, "charge": charge, "retry_after_s": retry_after_s}
        for name, value in named.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, _value: object) -> None:
        raise TypeError(f"{name!r} of a Released value cannot be changed")


def public(view: r.Public, status: int = 200) -> Released:
    """Wraps an answer that follows from requests and policy alone."""
    if not isinstance(view, r.Public):
        raise TypeError(f"{type(view).__name__} is not public")
    return Released(_SEAL, _encode(view), status, None)


def refused(error: errors.TrocarError) -> Released:
    """Wraps a refusal. Its text is made from the request, never from activations."""
    body = json.dumps(error.as_json(), separators=(",", ":"))  # ASCII: a lone surrogate has no UTF-8
    return Released(_SEAL, body.encode(), error.status, None, error.retry_after_s)


def document(schema: Mapping[str, Any]) -> Released:
    """Wraps the server's own OpenAPI description."""
    return Released(_SEAL, json.dumps(schema).encode(), 200, None)


@dataclass(frozen=True, slots=True)
class Priced:
    """A result on its way out: quantised, counted, not charged yet."""

    payload: bytes
    bits: int


def prepare(result: r.RunResult | r.SessionResult, cost: Cost, token_bits: int, scalar_bits: int) -> Priced:
    """Quantises and counts a result.

    Args:
        result: outputs with float32 precision; `receipt.released_bits` is filled in here.
        cost: the static cost that was reserved. The prices of a session's step i stand under `stepi.`; the
            overhead, which is one, counts in the first.

    Raises:
        RunFailed: `result_not_finite`.
        ServerFault: `internal` if any output counts more bits than its static price: nothing leaves.
    """
    if isinstance(result, r.RunResult):
        final, bits = _final(result, cost.bits_out, token_bits, scalar_bits)
        return Priced(_encode(final, _absent(final)), bits)
    priced = [
        _final(step, _step_prices(cost.bits_out, i), token_bits, scalar_bits)
        for i, step in enumerate(result.steps)
    ]
    steps = tuple(final for final, _ in priced)
    absent = {"steps": {i: _absent(step) for i, step in enumerate(steps)}}
    return Priced(_encode(r.SessionResult(steps=steps), absent), sum(bits for _, bits in priced))


def _step_prices(prices: Mapping[str, int], index: int) -> dict[str, int]:
    prefix = f"step{index}."
    mine = {n.removeprefix(prefix): bits for n, bits in prices.items() if n.startswith(prefix)}
    return mine if index else {"overhead": prices["overhead"], **mine}


def _final(
    result: r.RunResult, prices: Mapping[str, int], token_bits: int, scalar_bits: int
) -> tuple[r.RunResult, int]:
    """The result as it leaves, and its bits; the outputs of a sweep's variants share one price."""
    counts = {name: prices[name] for name in _SHARED if name in prices}
    n_edits = len(result.receipt.edits) + sum(len(v.edits) for v in result.sweep)
    if 2 * scalar_bits * n_edits > counts.get("receipts", 0):
        raise errors.refuse("internal", "receipts", "the receipts are larger than their price")
    for outputs in (result.outputs, *(v.outputs for v in result.sweep)):
        for name, output in outputs.items():
            if name in _SHARED or name not in prices:
                raise errors.refuse("internal", name, "an output without a price")
            counts[name] = counts.get(name, 0) + measure(output, token_bits, scalar_bits)
            if counts[name] > prices[name]:
                raise errors.refuse("internal", name, "an output is larger than its price")
    receipt = {"released_bits": counts, "edits": _receipts(result.receipt.edits, scalar_bits)}
    final = {
        "outputs": _quantised(result.outputs, scalar_bits),
        "receipt": result.receipt.model_copy(update=receipt),
        "sweep": tuple(_variant(v, scalar_bits) for v in result.sweep),
    }
    return result.model_copy(update=final), sum(counts.values())


def _variant(variant: r.VariantResult, scalar_bits: int) -> r.VariantResult:
    return variant.model_copy(
        update={
            "outputs": _quantised(variant.outputs, scalar_bits),
            "edits": _receipts(variant.edits, scalar_bits),
        }
    )


def _quantised(outputs: Mapping[str, r.Output], scalar_bits: int) -> dict[str, r.Output]:
    return {name: quantise(output, scalar_bits) for name, output in outputs.items()}


def _receipts(edits: tuple[r.EditReceipt, ...], scalar_bits: int) -> tuple[r.EditReceipt, ...]:
    return tuple(_receipt(e, scalar_bits) for e in edits)


def _absent(result: r.RunResult) -> dict[str, Any]:
    """Fields that are left out: a run that is no sweep says nothing of one."""
    return {} if result.sweep else {"sweep": True}


def seal(priced: Priced, settle: Callable[[int, bytes], r.Charge]) -> Released:
    """Charges, then makes the bytes releasable; if the charge fails, nothing leaves."""
    return Released(_SEAL, priced.payload, 200, settle(priced.bits, priced.payload))


def replay(payload: bytes, charge: r.Charge) -> Released:
    """The same bytes again, to the same key under the same idempotency key, for 0 bits."""
    return Released(_SEAL, payload, 200, charge)


def measure(output: r.Output, token_bits: int, scalar_bits: int) -> int:
    """Bits of one output as sent. A capture has none: its handle is random, its row counts are `lengths`."""
    if isinstance(output, r.TextOutput):
        return sum(len(row) + 1 for row in output.ids) * token_bits
    if isinstance(output, r.FitOutput):
        return sum(len(s.metrics) for s in output.sites) * scalar_bits
    if isinstance(output, r.ScoreOutput) and output.truth:
        return len(output.scores)
    ids = _leaves(output.ids) * token_bits if isinstance(output, r.LensOutput) else 0
    field = _NUMBERS.get(type(output))
    return ids + (0 if field is None else _leaves(getattr(output, field)) * scalar_bits)


def _leaves(nested: tuple[Any, ...]) -> int:
    return sum(_leaves(x) for x in nested) if nested and isinstance(nested[0], tuple) else len(nested)


def quantise(output: r.Output, scalar_bits: int) -> r.Output:
    """The output with every number rounded to `scalar_bits`."""
    if isinstance(output, r.FitOutput):
        return output.model_copy(update={"sites": tuple(_metrics(s, scalar_bits) for s in output.sites)})
    if isinstance(output, r.ScoreOutput) and output.truth:
        return output.model_copy(update={"scores": _truths(output)})
    field = _NUMBERS.get(type(output))
    if field is None:
        return output
    return output.model_copy(update={field: _rounded(getattr(output, field), scalar_bits)})


def _rounded(nested: tuple[Any, ...], scalar_bits: int) -> tuple[Any, ...]:
    if nested and isinstance(nested[0], tuple):
        return tuple(_rounded(x, scalar_bits) for x in nested)
    return _round_row(nested, scalar_bits)


def _truths(output: r.ScoreOutput) -> tuple[float, ...]:
    """One bit each: whatever they were, 0 or 1 leaves."""
    return tuple(float(x != 0) for x in output.scores)


def _metrics(site: r.SiteMetrics, scalar_bits: int) -> r.SiteMetrics:
    values = _round_row(tuple(site.metrics.values()), scalar_bits)
    return site.model_copy(update={"metrics": dict(zip(site.metrics, values, strict=True))})


def _receipt(edit: r.EditReceipt, scalar_bits: int) -> r.EditReceipt:
    before, after = _round_row((edit.norm_before, edit.norm_after), scalar_bits)
    return edit.model_copy(update={"norm_before": before, "norm_after": after})


def _round_row(row: tuple[float, ...], scalar_bits: int) -> tuple[float, ...]:
    with np.errstate(over="ignore"):  # what overflows is an infinity, refused in the next line
        values = np.asarray(row, dtype=np.float32)
    rounded = round_to_bits(values, scalar_bits)
    # The shortest decimal that names the float32: the text is a function of the charged bits alone.
    return tuple(float(str(x)) for x in rounded)


def require_scalar_bits(bits: int) -> None:
    """Refuses a width that is no float: below 10 a mantissa bit is missing, above 32 there is nothing to send.

    Raises:
        ServerFault: `bad_bits`.
    """
    if not _SIGN_AND_EXPONENT < bits <= _SIGN_AND_EXPONENT + _MANTISSA:
        raise errors.refuse("bad_bits", "scalar_bits", f"scalar_bits is {bits}; it must be in [10, 32]")


def round_to_bits(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Rounds float32 to the nearest float of `bits` bits (8 exponent bits), ties to even.

    Args:
        values: float32, any shape.
        bits: 10 to 32.

    Raises:
        RunFailed: `result_not_finite`.
        ServerFault: `bad_bits`.
    """
    require_scalar_bits(bits)
    if not (np.abs(values) < _LARGEST).all():  # also true for NaN
        raise errors.refuse("result_not_finite", "", "a result is NaN or infinite")
    drop = _MANTISSA - (bits - _SIGN_AND_EXPONENT)
    if drop == 0:
        return values
    raw = values.view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1) + ((raw >> np.uint32(drop)) & np.uint32(1))
    kept = (raw + half) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    return kept.view(np.float32)


def _encode(model: Strict, absent: dict[str, Any] | None = None) -> bytes:
    return model.model_dump_json(exclude=absent or None).encode()
