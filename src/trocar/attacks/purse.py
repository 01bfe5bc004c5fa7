"""One key's budget and what was bought with it: asks prices, fits requests to what is left, counts what came.

The count is the attacker's own: every number, token id and truth value of every answer at the width that the
server charges for it, measured from public plans. It must never exceed what the ledger charged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np

from trocar import errors
from trocar.client.airlock import Export, Handled
from trocar.client.outputs import (
    LensResult,
    LogprobsResult,
    MetricResult,
    PatternResult,
    RawResult,
    ScoreResult,
)
from trocar.client.results import Plan, Text
from trocar.client.sync import Client, Model
from trocar.client.trace import Recorded
from trocar.strict import Strict

NORMS_PER_EDIT: Final = 2
T = TypeVar("T")
_REFUSED: Final = (
    errors.PolicyRefusal, errors.ProgramError, errors.BadRequest, errors.NotFound, errors.Conflict,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Widths:
    """Bits of a released number, of a token id, and of a request."""

    number_bits: int
    token_bits: int
    overhead_bits: int

    @classmethod
    def of(cls, model: Model) -> Widths:
        """The number's from two plans that differ by one number; plans are free."""
        one, two = (_one_score(model, n) for n in (1, 2))
        token_bits = (model.facts.vocab_size - 1).bit_length()
        return cls(two["s"] - one["s"], token_bits, one["overhead"])

    def received(self, output: Any) -> int:
        """Bits of one output as it came."""
        if isinstance(output, ScoreResult):
            return len(output.view.scores) * (1 if output.view.truth else self.number_bits)
        if isinstance(output, LensResult):
            return int(output.ids.size) * (self.token_bits + self.number_bits)
        if isinstance(output, LogprobsResult | PatternResult | MetricResult):
            return int(output.values.size) * self.number_bits
        if isinstance(output, list):
            return sum((len(t.ids) + 1) * self.token_bits for t in output if isinstance(t, Text))
        if isinstance(output, RawResult):
            widths = sum(rows.width for rows in output.view.values.values())
            return len(output.view.prompts) * widths * output.bits
        return 0


def _one_score(model: Model, tokens: int) -> dict[str, int]:
    direction = np.ones(model.d_model, dtype=np.float32)
    with model.trace([[0] * tokens]) as t:
        t.save("s", t.score(t.embeddings["prompt[*]"] @ direction))
    return t.plan().view.cost.bits_out


@dataclass(slots=True)
class Purse:
    """A key on one model.

    Attributes:
        charged_bits: what the answers said they cost.
        received_bits: what came, by the attacker's own count.
        refusals: codes, in the order met.
    """

    client: Client
    model: Model
    widths: Widths
    charged_bits: int = 0
    received_bits: int = 0
    refusals: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, client: Client, model: str) -> Purse:
        served = client.model(model)
        return cls(client, served, Widths.of(served))

    def numbers(self, wanted: int) -> int:
        """How many of the wanted numbers one request can still buy."""
        left = self.client.ledger().budgets[self.model.name].left_bits
        if left is None or self.widths.overhead_bits + wanted * self.widths.number_bits <= left:
            return wanted
        self._note("budget_exhausted")
        return max(0, left - self.widths.overhead_bits) // self.widths.number_bits

    def plan(self, recorded: Recorded) -> Plan | None:
        """The price; None when the program is refused."""
        return self.ask(lambda: self.model.plan(recorded))

    def run(self, recorded: Recorded) -> Mapping[str, Any] | None:
        """The outputs; None when it was refused."""
        results = self.ask(lambda: self.model.run(recorded).result())
        if results is None:
            return None
        self.charged_bits += results.charge.bits
        self.received_bits += sum(self.widths.received(o) for o in results.values())
        self.received_bits += NORMS_PER_EDIT * self.widths.number_bits * len(results.receipt.edits)
        return results

    def most(self, record: Callable[[int], Recorded], upto: int) -> int:
        """How many of `upto` parts one request may have, by budget and policy; plans are free."""
        full = self.plan(record(upto)) if upto else None
        if upto < 1 or (full is not None and full.admitted):
            return upto
        one = self.plan(record(1))
        if one is None or not one.admitted:
            if one is not None:
                self._note("budget_exhausted")
            return 0
        return self._part(record, one, full, upto)

    def _part(self, record: Callable[[int], Recorded], one: Plan, full: Plan | None, upto: int) -> int:
        """More than none and fewer than all: where the budget ends when prices grow evenly, else by halves."""
        left = one.view.budget.left_bits
        low, high = 1, upto
        if full is not None and left is not None and upto > 1:
            self._note("budget_exhausted")
            each = max(1, -((one.bits - full.bits) // (upto - 1)))
            low, high = min(upto - 1, 1 + (left - one.bits) // each), 0
            while low > 1 and not self._admits(record(low)):
                low -= 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._admits(record(middle)) else (low, middle)
        return low

    def export(self, handle: Handled, reason: str, controls: str) -> Export | None:
        """A file out of the airlock; None when it is refused, or has to wait for people."""

        def asked() -> Export:
            return self.client.request_release(handle, reason=reason, controls=controls).file()

        export = self.ask(asked)
        if export is not None:
            numbers = sum(array.size for array in export.arrays.values())
            self.received_bits += numbers * int(export.manifest["bits"])
        return export

    def _admits(self, recorded: Recorded) -> bool:
        plan = self.plan(recorded)
        return plan is not None and plan.admitted

    def post(self, path: str, body: Strict) -> Any:
        """Sends what the SDK has no words for; None when it is refused."""
        core = self.client._core
        return self.ask(lambda: self.client._portal.call(core.transport.post, path, body, once=True))

    def ask(self, attempt: Callable[[], T]) -> T | None:
        """What an attempt gives; None when it is refused, which is noted."""
        try:
            return attempt()
        except _REFUSED as e:
            self._note(e.code)
            return None

    def _note(self, code: str) -> None:
        if code not in self.refusals:
            self.refusals.append(code)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of a model is aimed at; the whole of a small one.

    Attributes:
        tokens: of the vocabulary.
        neurons: of one MLP.
        layer: whose MLP and attention are attacked.
        oracle_tokens: whose embeddings are asked for in yes and no.
        oracle_rounds: answers per weight.
        batch_rows: in one request.
    """

    tokens: int
    neurons: int
    layer: int = 0
    oracle_tokens: int = 64
    oracle_rounds: int = 8
    batch_rows: int = 128


@dataclass(frozen=True, slots=True)
class Raid:
    """What an attack works with: one purse, or several that collude."""

    purses: Sequence[Purse]
    effort: Effort

    @property
    def purse(self) -> Purse:
        return self.purses[0]

    @property
    def model(self) -> Model:
        return self.purses[0].model

    def tokens(self, count: int) -> list[int]:
        """A fixed sample of the vocabulary, in order; all of it when it is small."""
        return self.sample(self.model.facts.vocab_size, count)

    @staticmethod
    def sample(vocabulary: int, count: int) -> list[int]:
        rng = np.random.default_rng(0)
        return sorted(rng.choice(vocabulary, min(count, vocabulary), replace=False).tolist())
