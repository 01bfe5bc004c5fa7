"""What is asked of the logits, which do not leave: `logits.top(5)`, or `return_type=[top(5), loss()]` in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trocar.client.trace import Trace
from trocar.fronts import words
from trocar.fronts.values import Recording
from trocar.graph.builder import Position

_ASK: Final = (
    "Ask .top(k), .logprobs(tokens), .logit_diff(a, b) or .loss(); or give return_type=[top(5), loss()] "
    "with functions of trocar.hooks, for several answers of one run."
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One question about the logits."""

    name: str
    output: Callable[[Trace[Any, Any]], Any]


def top(k: int = 5, *, at: Position = -1) -> Ask:
    """The k most likely next tokens after the positions `at`: a `LensResult`."""
    return Ask("top", lambda t: t.lens(t.final_norm[at], top_k=k))


def logprobs(tokens: Sequence[Any], *, at: Position = -1) -> Ask:
    """Log-probabilities of named next tokens: a `LogprobsResult`."""
    return Ask("logprobs", lambda t: t.logprobs(tokens, at=at))


def logit_diff(first: Any, second: Any, *, at: Position = -1) -> Ask:
    """Logit of the first token minus that of the second, for each prompt: a `MetricResult`."""
    return Ask("logit_diff", lambda t: t.logit_diff(first, second, at=at))


def loss() -> Ask:
    """Cross-entropy in nats, the mean over the tokens of each prompt: a `MetricResult`."""
    return Ask("loss", lambda t: t.cross_entropy())


def asks_of(return_type: Any) -> list[Ask] | None:
    """The questions of a `return_type`; None for "logits", which are asked later.

    Raises:
        ClientError: `bad_argument` for another word.
    """
    if isinstance(return_type, str) and return_type == "logits":
        return None
    if return_type is None:
        return []
    several = return_type if isinstance(return_type, list | tuple) else [return_type]
    return [_ask(x) for x in several]


def _ask(what: Any) -> Ask:
    if isinstance(what, Ask):
        return what
    if isinstance(what, str) and what == "loss":
        return loss()
    step = 'Give "logits", "loss", None, or top(k), logprobs(tokens), logit_diff(a, b) of trocar.hooks.'
    raise words.refuse("return_type", f"return_type={what!r}", step)


def answered(recording: Recording, return_type: Any) -> Callable[[Any], Any]:
    """Records the questions; gives what finds the answers in the results."""
    asks = asks_of(return_type) or []
    names = [f"{ask.name}{i}" for i, ask in enumerate(asks)]
    for name, ask in zip(names, asks, strict=True):
        recording.trace.save(name, ask.output(recording.trace))
    if not asks:
        return lambda results: None
    if isinstance(return_type, list | tuple):
        return lambda results: tuple(results[name] for name in names)
    return lambda results: results[names[0]]


class Logits:
    """Logits of a run that is recorded and has not run; each question runs it. They never leave as they are."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def top(self, k: int = 5, *, at: Position = -1) -> Any:
        """Runs, and gives the k most likely next tokens after the positions `at`."""
        return self.ask(top(k, at=at))

    def logprobs(self, tokens: Sequence[Any], *, at: Position = -1) -> Any:
        """Runs, and gives log-probabilities of named next tokens."""
        return self.ask(logprobs(tokens, at=at))

    def logit_diff(self, first: Any, second: Any, *, at: Position = -1) -> Any:
        """Runs, and gives the difference of two logits for each prompt."""
        return self.ask(logit_diff(first, second, at=at))

    def loss(self) -> Any:
        """Runs, and gives the cross-entropy of each prompt in nats."""
        return self.ask(loss())

    def ask(self, *asks: Ask) -> Any:
        """Runs once for several questions; one answer for one question, else a tuple."""
        branch = self._recording.branch()
        find = answered(branch, asks[0] if len(asks) == 1 else asks)
        return find(branch.run())

    def __getitem__(self, index: Any) -> Any:
        raise words.not_here("logits", f"{self!r} are indexed, and nothing has run", _ASK)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise words.not_here("logits", f"{self!r} are not a local array", _ASK)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = ("ask", "logit_diff", "logprobs", "loss", "top")
        raise words.not_recorded(name, repr(self), known, step=None if name in words.REFUSED else _ASK)

    def __repr__(self) -> str:
        return "<logits of a recorded run, on the server>"
