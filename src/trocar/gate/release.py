"""`Released`: the only thing that may cross the network, and the only room that can make one.

What came out of a model is rebuilt and rounded by `answers`, held against its price here, and charged here before
it exists as bytes. What follows from requests and policy alone (`Public` views, refusals) is wrapped for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from trocar import errors
from trocar.gate.answers import Answer, Raw, Reader, Tongue
from trocar.gate.coding import Coder
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import ModelFacts
from trocar.strict import Strict
from trocar.wire import results as r

_SEAL: Final = object()
JSON: Final = "application/json"
FILE: Final = "application/octet-stream"


class Released:
    """Bytes that may leave, with what they cost. Made only by this module.

    Attributes:
        payload: canonical JSON, or a file of the airlock.
        status: how the answer ends, as an HTTP status.
        charge: the ledger's entry, None for public answers.
        retry_after_s: when a refusal for lack of room may go through.
        media_type: of the payload.
    """

    __slots__ = ("charge", "media_type", "payload", "retry_after_s", "status")
    payload: bytes
    status: int
    charge: r.Charge | None
    retry_after_s: int | None
    media_type: str

    def __init__(
        self,
        seal: object,
        payload: bytes,
        status: int,
        charge: r.Charge | None,
        retry_after_s: int | None = None,
        media_type: str = JSON,
    ) -> None:
        if seal is not _SEAL:
            raise TypeError("only trocar.gate.release makes Released values")
        named = {"payload": payload, "status": status, "charge": charge, "retry_after_s": retry_after_s}
        named["media_type"] = media_type
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
    """A result on its way out: rounded, counted, not charged yet."""

    payload: bytes
    bits: int


@dataclass(frozen=True, slots=True)
class Variant:
    """One program of a request, with the settings of a sweep that made it."""

    settings: Mapping[str, int | float | str]
    raw: Raw


@dataclass(frozen=True, slots=True)
class Step:
    """What one request ran.

    Attributes:
        variants: of a sweep, or the program alone.
        tokens: token texts of the prompts.
        receipt: its public part; what was edited, released and how it was rounded is filled in here.
    """

    variants: Sequence[Variant]
    swept: bool
    tokens: tuple[tuple[str, ...], ...]
    receipt: r.Receipt


@dataclass(frozen=True, slots=True)
class Press:
    """Makes payloads of one model at one caller's prices."""

    facts: ModelFacts
    tongue: Tongue
    prices: Prices

    @property
    def coder(self) -> Coder:
        return Coder(self.prices)

    def run(self, step: Step, cost: Cost) -> Priced:
        """One request.

        Args:
            cost: the static cost that was reserved.

        Raises:
            RunFailed: `result_not_finite`, `edit_missed`.
            ServerFault: `bad_result`, or `internal` if anything counts more bits than its static price: nothing leaves.
        """
        result, bits = self._result(step, cost.bits_out)
        return Priced(_encode(result, _absent(result)), bits)

    def session(self, steps: Sequence[Step], cost: Cost, *, keep: bool) -> Priced:
        """Requests that ran one after another; the prices of step i stand under `stepi.`, and the overhead, which is
        one, counts in the first.

        Args:
            keep: whether captures stay; handles that will not be there are not told.
        """
        made = [self._result(step, _step_prices(cost.bits_out, i)) for i, step in enumerate(steps)]
        results = tuple(result if keep else _without_handles(result) for result, _ in made)
        absent = {"steps": {i: _absent(result) for i, result in enumerate(results)}}
        return Priced(_encode(r.SessionResult(steps=results), absent), sum(bits for _, bits in made))

    def fit(self, result: r.RunResult, cost: Cost) -> Priced:
        """A fit: numbers that stand alone."""
        counts = {"overhead": cost.bits_out["overhead"]}
        outputs: dict[str, r.Output] = {}
        for name, output in result.outputs.items():
            if not isinstance(output, r.FitOutput):
                raise errors.refuse("internal", name, "a fit gives nothing but fits")
            sites = tuple(self._metrics(site) for site in output.sites)
            counts[name] = self.coder.bits_alone(sum(len(s.metrics) for s in sites))
            outputs[name] = output.model_copy(update={"sites": sites})
        _require_priced(counts, cost.bits_out)
        receipt = result.receipt.model_copy(update={"released_bits": counts, "precision": self.precision})
        final = result.model_copy(update={"outputs": outputs, "receipt": receipt})
        return Priced(_encode(final, _absent(final)), sum(counts.values()))

    def ticket(self, view: r.Public, cost: Cost) -> Priced:
        """What became of a request to the airlock: its whole price, whatever is said of its numbers."""
        return Priced(_encode(view), cost.total_bits)

    @property
    def precision(self) -> r.Precision:
        coder = self.coder
        return r.Precision(
            scalar_bits=self.prices.scalar_bits,
            vector_bits=self.prices.vector_bits,
            logprob_step=coder.step,
            logprob_floor=coder.floor,
        )

    def _metrics(self, site: r.SiteMetrics) -> r.SiteMetrics:
        with np.errstate(over="ignore"):  # what overflows is an infinity, refused in the next line
            values = np.asarray(tuple(site.metrics.values()), dtype=np.float32)
        rounded = (float(str(x)) for x in self.coder.alone(values))
        return site.model_copy(update={"metrics": dict(zip(site.metrics, rounded, strict=True))})

    def _result(self, step: Step, prices: Mapping[str, int]) -> tuple[r.RunResult, int]:
        """The result as it leaves, and its bits; the variants of a sweep share the prices of their outputs."""
        counts = {"overhead": prices["overhead"]} if "overhead" in prices else {}
        answers: list[Answer] = []
        for variant in step.variants:
            answer = Reader.of(variant.raw, self.facts, self.tongue, self.coder).answer()
            for name, bits in answer.bits.items():
                counts[name] = counts.get(name, 0) + bits
            answers.append(answer)
        _require_priced(counts, prices)
        filled: dict[str, Any] = {"released_bits": counts, "precision": self.precision}
        if step.swept:
            sweep = tuple(
                r.VariantResult(settings=dict(v.settings), outputs=a.outputs, edits=a.edits)
                for v, a in zip(step.variants, answers, strict=True)
            )
            receipt = step.receipt.model_copy(update=filled)
            result = r.RunResult(outputs={}, tokens=step.tokens, receipt=receipt, sweep=sweep)
        else:
            receipt = step.receipt.model_copy(update={**filled, "edits": answers[0].edits})
            result = r.RunResult(outputs=answers[0].outputs, tokens=step.tokens, receipt=receipt)
        return result, sum(counts.values())


def _require_priced(counts: Mapping[str, int], prices: Mapping[str, int]) -> None:
    for name, bits in counts.items():
        if bits > prices.get(name, -1):
            what = "has no price" if name not in prices else "is larger than its price"
            raise errors.refuse("internal", name, f"what leaves as {name!r} {what}")


def _step_prices(prices: Mapping[str, int], index: int) -> dict[str, int]:
    prefix = f"step{index}."
    mine = {n.removeprefix(prefix): bits for n, bits in prices.items() if n.startswith(prefix)}
    return mine if index else {"overhead": prices["overhead"], **mine}


def _without_handles(result: r.RunResult) -> r.RunResult:
    sweep = tuple(v.model_copy(update={"outputs": _left(v.outputs)}) for v in result.sweep)
    return result.model_copy(update={"outputs": _left(result.outputs), "sweep": sweep})


def _left(outputs: Mapping[str, r.Output]) -> dict[str, r.Output]:
    return {name: o for name, o in outputs.items() if not isinstance(o, r.CaptureOutput)}


def _absent(result: r.RunResult) -> dict[str, Any]:
    """Fields that are left out: a run that is no sweep says nothing of one."""
    return {} if result.sweep else {"sweep": True}


def seal(priced: Priced, settle: Callable[[int, bytes], r.Charge]) -> Released:
    """Charges, then makes the bytes releasable; if the charge fails, nothing leaves."""
    return Released(_SEAL, priced.payload, 200, settle(priced.bits, priced.payload))


def replay(payload: bytes, charge: r.Charge) -> Released:
    """The same bytes again, to the same key under the same idempotency key, for 0 bits."""
    return Released(_SEAL, payload, 200, charge)


def exported(payload: bytes, charge: r.Charge) -> Released:
    """A file of the airlock, which charged it before it gave it."""
    return Released(_SEAL, payload, 200, charge, media_type=FILE)


def forwarded(
    payload: bytes,
    status: int,
    charge: r.Charge | None = None,
    retry_after_s: int | None = None,
    media_type: str = JSON,
) -> Released:
    """What a gate in another process made, in the process that speaks HTTP for it: nothing is added there."""
    return Released(_SEAL, payload, status, charge, retry_after_s, media_type)


def _encode(model: Strict, absent: dict[str, Any] | None = None) -> bytes:
    return model.model_dump_json(exclude=absent or None).encode()
