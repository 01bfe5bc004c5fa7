"""What a job gave back: outputs by name, the receipt, what the ledger charged; and plans.

The kinds of outputs are in `outputs`, the variants of a sweep in `sweeps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from trocar import errors
from trocar.client.notebook import bits_text, html_table, text_table
from trocar.client.outputs import Tokens, shown
from trocar.client.sweeps import Sweep, Variant
from trocar.wire import results as r

H = TypeVar("H")
H2 = TypeVar("H2")


class Text(str):
    """Generated text that remembers its token ids, whether an end token came, and the receipt."""

    __slots__ = ("finished", "ids", "receipt")

    ids: tuple[int, ...]
    finished: bool
    receipt: r.Receipt

    @classmethod
    def of(cls, view: r.TextOutput, index: int, receipt: r.Receipt) -> Text:
        text = cls(view.texts[index])
        text.ids, text.finished, text.receipt = view.ids[index], view.finished[index], receipt
        return text


class Results(Mapping[str, Any], Generic[H]):
    """The outputs of a job by name, its receipt, and what the ledger charged.

    Attributes:
        sweep: the variants of a sweep; empty when there was none.
    """

    def __init__(self, result: r.RunResult, charge: r.Charge, bind: Callable[[r.CaptureOutput], H]) -> None:
        self.receipt = result.receipt
        self.charge = charge
        self.tokens = result.tokens
        self._raw = result
        self._outputs = {n: _wrap(o, self.tokens, self.receipt, bind) for n, o in result.outputs.items()}
        self.sweep = Sweep(tuple(self._variant(v, bind) for v in result.sweep))

    def _variant(self, view: r.VariantResult, bind: Callable[[r.CaptureOutput], H]) -> Variant:
        receipt = self.receipt.model_copy(update={"edits": view.edits})
        outputs = {name: _wrap(o, self.tokens, receipt, bind) for name, o in view.outputs.items()}
        return Variant(view.settings, outputs, view.edits)

    def rebind(self, bind: Callable[[r.CaptureOutput], H2]) -> Results[H2]:
        """The same results with handles bound to another client."""
        return Results(self._raw, self.charge, bind)

    def __getitem__(self, name: str) -> Any:
        if name not in self._outputs:
            near = errors.closest(name, self._outputs)
            hint = f"; closest {near!r}" if near else ""
            if self.sweep:
                hint = "; this is a sweep: results.sweep[i][name] is one variant's"
            raise KeyError(f"no output {name!r}; there are {sorted(self._outputs)}{hint}")
        return self._outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def _rows(self) -> list[list[str]]:
        bits = self.receipt.released_bits
        return [[name, type(o).__name__, bits_text(bits[name])] for name, o in self._outputs.items()]

    def __repr__(self) -> str:
        edits = "".join(
            f"\n  edit {e.id}: {e.op} at {e.site}, {e.rows} rows, mean norm {e.norm_before:.4g} -> {e.norm_after:.4g}"
            for e in self.receipt.edits
        )
        charge = f"{bits_text(self.charge.bits)} released, ledger entry {self.charge.seq}"
        head = f"Results of {self.receipt.model}, {charge}"
        if self.sweep:
            return f"{head}\n{self.sweep!r}"
        return text_table(head, ["output", "type", "released"], self._rows()) + edits

    def _repr_html_(self) -> str:
        if self.sweep:
            return self.sweep._repr_html_()
        return html_table(
            f"{self.receipt.model}: {bits_text(self.charge.bits)} released, ledger entry {self.charge.seq}",
            ["output", "type", "released"],
            self._rows(),
        )


def _wrap(
    output: r.Output, tokens: Tokens, receipt: r.Receipt, bind: Callable[[r.CaptureOutput], Any]
) -> Any:
    if isinstance(output, r.CaptureOutput):
        return bind(output)
    if isinstance(output, r.TextOutput):
        return [Text.of(output, i, receipt) for i in range(len(output.texts))]
    return shown(output, tokens)


class SessionResults(Sequence[Results[H]], Generic[H]):
    """The results of a session's steps, in order; `charge` is the bill of them all."""

    def __init__(
        self, result: r.SessionResult, charge: r.Charge, bind: Callable[[r.CaptureOutput], H]
    ) -> None:
        self.charge = charge
        self._raw = result
        self._steps = tuple(Results(step, charge, bind) for step in result.steps)

    def rebind(self, bind: Callable[[r.CaptureOutput], H2]) -> SessionResults[H2]:
        """The same results with handles bound to another client."""
        return SessionResults(self._raw, self.charge, bind)

    @overload
    def __getitem__(self, step: int) -> Results[H]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[Results[H]]: ...
    def __getitem__(self, step: int | slice) -> Results[H] | Sequence[Results[H]]:
        return self._steps[step]

    def __len__(self) -> int:
        return len(self._steps)

    def _rows(self) -> list[list[str]]:
        outputs = [", ".join(s) or (f"{len(s.sweep)} variants" if s.sweep else "") for s in self._steps]
        bits = [bits_text(sum(s.receipt.released_bits.values())) for s in self._steps]
        return [[str(i), *pair] for i, pair in enumerate(zip(outputs, bits, strict=True))]

    def __repr__(self) -> str:
        head = f"Results of a session, {bits_text(self.charge.bits)} released, ledger entry {self.charge.seq}"
        return text_table(head, ["step", "outputs", "released"], self._rows())

    def _repr_html_(self) -> str:
        return html_table("Results of a session", ["step", "outputs", "released"], self._rows())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a program would do and cost. Nothing ran and nothing was spent."""

    view: r.PlanView

    @property
    def bits(self) -> int:
        """Most bits that may leave."""
        return self.view.cost.total_bits

    @property
    def admitted(self) -> bool:
        """Whether the budget has room for it."""
        return self.view.admitted

    def _rows(self) -> list[list[str]]:
        c, b = self.view.cost, self.view.budget
        left = "counted, not capped" if b.left_bits is None else f"{bits_text(b.left_bits)} left"
        return [
            ["prompts", f"{self.view.prompts} ({sum(self.view.lengths)} tokens)"],
            *([["variants", str(self.view.variants)]] if self.view.variants > 1 else []),
            ["forward", f"{c.tokens} tokens, {c.flops:.2e} FLOPs"],
            ["rows read", str(c.rows_read)],
            ["stored", f"{c.bytes_stored} bytes on the server"],
            *[[f"edit {e.id}", f"{e.op} {e.site} at {e.at}: {e.rows} rows"] for e in self.view.edits],
            *[
                [f"output {o.id}", f"{o.op}, leaves as {o.leaves_as}: {bits_text(o.bits)}"]
                for o in self.view.outputs
            ],
            ["overhead", bits_text(sum(c.bits_out.get(n, 0) for n in ("overhead", "receipts", "lengths")))],
            [
                "bits out",
                f"at most {bits_text(c.total_bits)}; the same rows as bf16: {bits_text(c.download_bits)}",
            ],
            ["budget", f"tier {b.tier}: {left}" + ("" if self.view.admitted else "; NOT admitted")],
        ]

    def __repr__(self) -> str:
        return text_table(f"Plan on {self.view.model}", ["what", "how much"], self._rows())

    def _repr_html_(self) -> str:
        return html_table(f"Plan on {self.view.model}", ["what", "how much"], self._rows())
