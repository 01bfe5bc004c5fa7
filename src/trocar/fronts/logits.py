"""Logits in the spelling of tensors: `logits[:, -1].argmax(-1)`. They never leave as they are.

What leaves are tokens, log-probabilities of named tokens, and differences of two logits at one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar.fronts import words
from trocar.fronts.indexing import Steps, Window, shown
from trocar.fronts.saved import Numbers, Shown
from trocar.fronts.values import Recording, Value
from trocar.graph.builder import Expr
from trocar.sites import Site

Scale = Literal["logits", "log_softmax", "softmax"]
_ASK: Final = (
    "Ask for .topk(k), .argmax(-1), .log_softmax(-1)[:, -1, token], or a difference: "
    "logits[:, -1, a] - logits[:, -1, b]."
)


class Logits(words.Elsewhere):
    """Logits of the model, or of rows that were put through its last norm and unembedding.

    Args:
        of: the rows of a logit lens; None for the model's own.
    """

    _instead = _ASK

    def __init__(
        self,
        recording: Recording,
        *,
        of: Value | None = None,
        window: Window | None = None,
        scale: Scale = "logits",
        steps: Steps | None = None,
    ) -> None:
        self._recording = recording
        self._of = of
        self._window = window or Window((*(of.dims[:-1] if of is not None else ("batch", "token")), "vocab"))
        self._scale: Scale = scale
        self._steps = steps or recording.steps
        recording.reach(Site("logits"))

    def __getitem__(self, index: Any) -> Logits | Picked:
        window = self._window.at(index, self._recording.prompts)
        if window.tokens != self._window.tokens and self._of is not None:
            step = "Index the rows: lm_head(norm(layer.output[0][:, -1]))."
            raise words.refuse("index", f"[{shown(index)}] selects positions of a lens", step)
        found = self._like(window, self._scale)
        return found if window.kind is None else Picked(found, window)

    def log_softmax(self, dim: int = -1) -> Logits:
        """Log-probabilities."""
        return self._scaled(dim, "log_softmax")

    def softmax(self, dim: int = -1) -> Logits:
        """Probabilities."""
        return self._scaled(dim, "softmax")

    def argmax(self, dim: int = -1) -> Top:
        """The most likely token of each row."""
        self._last(dim)
        return Top(self, 1, first=True)

    def topk(self, k: int, dim: int = -1) -> Top:
        """The k most likely tokens of each row."""
        self._last(dim)
        return Top(self, k)

    def _scaled(self, dim: int, scale: Scale) -> Logits:
        self._last(dim)
        if self._scale != "logits":
            raise words.refuse(scale, f"{self!r} are normalised already", "Normalise once.")
        return self._like(self._window, scale)

    def _last(self, dim: int) -> None:
        dims = self._window.dims
        if not -len(dims) <= dim < len(dims) or dims[dim] != "vocab":
            raise words.refuse("dim", f"dim={dim} of {self!r}", "Over the vocabulary: dim=-1.")

    def _like(self, window: Window, scale: Scale) -> Logits:
        return Logits(self._recording, of=self._of, window=window, scale=scale, steps=self._steps)

    def _rows(self) -> Expr:
        """The rows that the lens reads."""
        if self._of is not None:
            return self._of._one()
        at = self._at("topk")
        return self._recording.trace.final_norm[at]  # type: ignore[no-any-return]

    def _at(self, what: str) -> str:
        ats = self._steps.selectors(self._window.tokens)
        if len(ats) > 1:
            step = (
                f"Save .{what} under tracer.iter[0] and tracer.iter[1:], or the text: tracer.result.save()."
            )
            raise words.refuse(
                "save", f"{self!r}: the prompt's rows and generated rows are two outputs", step
            )
        return ats[0]

    def _shaped(self, array: npt.NDArray[Any], *, single: bool = False) -> npt.NDArray[Any]:
        """An array [N, ...] of the lens with the dimensions that the index left."""
        given = array[..., 0] if single else array
        if self._steps.gen:  # as many rows as tokens were generated
            return given
        if "batch" not in self._window.dims:
            return given if "token" in self._window.dims else given[0]
        one = "token" in self._window.dims and self._recording.prompts == 1
        return given[np.newaxis] if one else given

    def __getattr__(self, name: str) -> Any:
        if name == "save":
            raise words.not_here("save", f"{self!r} are not released as they are", _ASK)
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(name, repr(self), ("argmax", "topk", "softmax", "log_softmax"))

    def __setitem__(self, index: Any, value: Any) -> None:
        step = "Edit the rows that the unembedding reads: the last norm's output."
        raise words.refuse("index", "logits are not written", step)

    def __repr__(self) -> str:
        whose = "logits" if self._of is None else "logits of a lens"
        return f"<{whose}, on the server>" if self._scale == "logits" else f"<{self._scale} of {whose}>"


class Top:
    """The most likely tokens: `.indices` leave as they are, `.values` need a scale that leaves."""

    def __init__(self, logits: Logits, k: int, *, first: bool = False) -> None:
        self._logits = logits
        self._k = k
        self._first = first
        self._name = ""

    def save(self) -> Numbers:
        """Token ids [..., k], or [...] of argmax; `.texts` and `.result` are beside them."""
        return self._saved("tokens")

    @property
    def indices(self) -> Top:
        return self

    @property
    def values(self) -> TopValues:
        if self._logits._scale == "logits":
            step = "Write .log_softmax(-1).topk(k).values, or .softmax(-1).topk(k).values."
            raise words.not_here("values", "the numbers beside the top tokens are raw logits", step)
        return TopValues(self)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.indices))

    def _saved(self, what: Shown) -> Numbers:
        recording, scale = self._logits._recording, self._logits._scale

        def shape(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            shaped = self._logits._shaped(array, single=self._first)
            return np.exp(shaped) if what == "top" and scale == "softmax" else shaped

        saved = Numbers(what, shape)
        if self._name:  # one output gives both
            return recording.share(self._name, saved)
        lens = recording.trace.lens(self._logits._rows(), top_k=self._k)
        found = recording.save(lens, saved)
        self._name = found.name
        return found


class TopValues:
    """Log-probabilities or probabilities of the top tokens."""

    def __init__(self, top: Top) -> None:
        self._top = top

    def save(self) -> Numbers:
        return self._top._saved("top")


@dataclass(frozen=True, eq=False)
class Picked(words.Elsewhere):
    """Logits, or log-probabilities, of named tokens."""

    logits: Logits
    window: Window

    def save(self) -> Numbers:
        """Log-probabilities or probabilities [rows, tokens] of named tokens."""
        if self.logits._scale == "logits":
            raise words.not_here("save", "raw logits of tokens are not released", _ASK)
        self._own()
        exp = self.logits._scale == "softmax"
        one = "vocab" not in self.window.dims

        def shape(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            shaped = self.logits._shaped(array, single=one)
            return np.exp(shaped) if exp else shaped

        recording = self.logits._recording
        what = recording.trace.logprobs(self.window.picked or (), at=self.logits._at("log_softmax"))
        return recording.save(what, Numbers("numbers", shape))

    def __sub__(self, other: Any) -> Difference:
        if not isinstance(other, Picked):
            raise words.refuse("-", f"{other!r} is taken from {self!r}", _ASK)
        first, second = self._own(), other._own()
        same = self.window.tokens == other.window.tokens and self.logits._scale == other.logits._scale
        same = same and "token" not in self.window.dims
        if not same or len(first) != 1 or len(second) != 1 or self.logits._scale == "softmax":
            step = "Write logits[:, -1, a] - logits[:, -1, b], one token each."
            raise words.refuse("-", "a difference is of two tokens at the same position", step)
        return Difference(self.logits, first[0], second[0])

    def _own(self) -> tuple[Any, ...]:
        if self.logits._of is not None:
            step = "Ask a lens for .topk(k) or .argmax(-1); named tokens are asked of the model's own logits."
            raise words.refuse("index", "named tokens of a lens", step)
        return self.window.picked or ()

    def __repr__(self) -> str:
        return f"<{self.logits._scale} of {self.window.picked}, on the server>"


@dataclass(frozen=True)
class Difference:
    """The logit of one token minus that of another; a difference of log-probabilities is the same number."""

    logits: Logits
    first: Any
    second: Any

    def save(self) -> Numbers:
        """One number for each prompt."""
        recording, at = self.logits._recording, self.logits._at("logit_diff")
        scalar = "batch" not in self.logits._window.dims
        what = recording.trace.logit_diff(self.first, self.second, at=at)
        return recording.save(what, Numbers("numbers", lambda x: x[0] if scalar else x))
