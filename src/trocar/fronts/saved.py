"""What `.save()` gives: numbers that left the server through the gate, or a handle of rows that stay there.

Nothing is known before the block has ended and the request was answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar.fronts import words
from trocar.graph.builder import Position
from trocar.graph.program import Node

Shown = Literal["tokens", "top", "numbers"]
_WAIT: Final = "Use it after the block of the trace, or of the invoke, has ended."


class Saved:
    """An output of the request.

    Attributes:
        name: the output's name in the native result.
    """

    def __init__(self) -> None:
        self.name = ""
        self._result: Any = None

    def fill(self, results: Mapping[str, Any]) -> None:
        self._result = results[self.name]

    @property
    def result(self) -> Any:
        """The native result: `Activations`, `LensResult`, `LogprobsResult`, ..."""
        if self._result is None:
            raise words.not_here(
                "saved", "nothing has run yet: the request is sent when the block ends", _WAIT
            )
        return self._result


class Rows(Saved, words.Elsewhere):
    """Stored rows of one place. They are a value in later traces, and a fit runs on them; they are not here.

    Attributes:
        site: the canonical place.
    """

    _instead = "Use it in a later trace (`output[:, -1] = saved`), fit on it (saved.fit(...)), or reduce before save()."

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site: Final = site

    @property
    def value(self) -> Any:
        """The native `Activations`."""
        return self.result

    @property
    def handle(self) -> str:
        return str(self.result.handle)

    def fit(self, kind: Any, labels: Sequence[Any], **options: Any) -> Any:
        """A probe on these rows; see docs/fits.md."""
        return self.result.fit(kind, labels, **options)

    def rows(self, *, prompts: Sequence[int] | None = None, at: Position = "prompt[*]") -> Any:
        """Some of the rows, as a value: `saved.rows(at=-1)` is the last of each prompt."""
        return self.result[self.site].rows(prompts=prompts, at=at)

    def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
        node, coef = self.result[self.site].operand(node_id, site)
        return node, float(coef)

    def __getitem__(self, index: Any) -> Any:
        step = "saved.rows(at=-1) is a value for later traces; index before save() to store less."
        raise words.not_here("saved", f"{self!r} is indexed, and its rows are on the server", step)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(
            name, repr(self), ("fit", "handle", "name", "result", "rows", "site", "value")
        )

    def __repr__(self) -> str:
        if self._result is None:
            return f"<rows of {self.site}, saved when the block ends>"
        return f"<stored rows of {self.site}, handle {self._result.handle}, on the server>"


class Numbers(Saved):
    """Numbers that left the server: an array, with the native result beside it.

    Args:
        what: the array holds `tokens` of a lens, `top` log-probabilities of one, or the result's own `numbers`.
        shape: makes the array of the native one.
    """

    def __init__(
        self, what: Shown, shape: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda x: x
    ) -> None:
        super().__init__()
        self._what = what
        self._shape = shape

    @property
    def value(self) -> npt.NDArray[Any]:
        """The numbers."""
        if self._what == "tokens":
            return self._shape(self.result.ids[0])
        if self._what == "top":
            return self._shape(self.result.logprobs[0])
        return self._shape(self.result.to_numpy())

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Texts of the tokens, [rows][k]."""
        if self._what == "numbers":
            raise words.not_recorded("texts", repr(self), ("result", "value"))
        found: tuple[tuple[str, ...], ...] = self.result.texts[0]
        return found

    def item(self) -> Any:
        """The one number."""
        return self.value.item()

    def tolist(self) -> Any:
        return self.value.tolist()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __len__(self) -> int:
        return len(self.value)

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[Any]:
        return np.asarray(self.value, *args, **kwargs)

    def __float__(self) -> float:
        return float(self.value.item())

    def __int__(self) -> int:
        return int(self.value.item())

    def __repr__(self) -> str:
        return "<numbers, when the block ends>" if self._result is None else repr(self.value)


class Texts(Saved):
    """What was generated, one text for each prompt."""

    @property
    def value(self) -> list[Any]:
        """The texts; each has .ids, of the generated tokens only."""
        return list(self.result)

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return "<texts, when the block ends>" if self._result is None else repr(self.value)
