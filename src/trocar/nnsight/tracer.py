"""Traces, invokes and steps of a generation, and what a run gives: the blocks in which a program is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

from trocar.client.results import Plan
from trocar.client.sync import Model
from trocar.client.trace import Recorded
from trocar.fronts import words
from trocar.fronts.indexing import Steps
from trocar.fronts.logits import Logits
from trocar.fronts.saved import Texts
from trocar.fronts.values import Recording


class Traced(Protocol):
    """What a trace needs of the model that opened it."""

    _served: Model
    _recording: Recording | None

    @property
    def recording(self) -> Recording: ...


class Output:
    """What the model gives."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @property
    def logits(self) -> Logits:
        return Logits(self._recording)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(name, "the model's output", ("logits",))


class Generator:
    """What was generated."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @property
    def output(self) -> Generator:
        return self

    def save(self) -> Texts:
        """The text of each prompt; its .ids are those of the generated tokens alone."""
        if self._recording.max_new_tokens == 0:
            step = "Use lm.generate(prompt, max_new_tokens=n), or ask for tokens: lm.lm_head.output[:, -1].argmax(-1)."
            raise words.refuse("result", "the result of one pass is its logits", step)
        return self._recording.save(self._recording.trace.text(), Texts())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(name, "what was generated", ("output", "save"))


class Tracer:
    """A trace or, without a prompt, a frame for invokes: each of them is a request of its own."""

    def __init__(self, lm: Traced, prompts: tuple[Any, ...], options: dict[str, Any], *, runs: bool) -> None:
        if len(prompts) > 1:
            raise words.refuse("prompts", f"{len(prompts)} inputs", "Give several prompts as one list.")
        self._lm = lm
        self._options = _options(options)
        self._runs = runs
        self._own: Recording | None = None
        self._last: Recording | None = None
        self._plan: Plan | None = None
        if prompts:
            self._own = self._record(prompts[0], {})

    def invoke(self, *prompts: Any, **options: Any) -> Invoke:
        """A request for these prompts, sent when its block ends; what it saved may be used in the next."""
        if self._own is not None:
            step = (
                "Open the trace without a prompt: with lm.trace() as tracer: with tracer.invoke(prompt): ..."
            )
            raise words.refuse("invoke", "an invoke in a trace that has a prompt", step)
        if len(prompts) != 1:
            step = "Give the prompts to one invoke, as a list: what is written there is for all of them."
            raise words.refuse(
                "invoke", "an invoke without a prompt" if not prompts else "several inputs", step
            )
        return Invoke(self, self._record(prompts[0], _options(options)))

    def stop(self) -> None:
        """Leaves out the layers after the deepest one named so far."""
        self._recording.stop()

    def all(self) -> Iteration:
        """Every step of the generation, the pass over the prompt included."""
        return Iteration(self._recording, self._recording.every_step)

    @property
    def iter(self) -> Iterations:
        """`tracer.iter[2]`: some steps of the generation."""
        return Iterations(self._recording)

    @property
    def result(self) -> Generator:
        """What was generated."""
        return Generator(self._recording)

    @property
    def recorded(self) -> Recorded:
        """The native request of the trace, or of the last invoke."""
        if self._last is None:
            raise words.refuse("recorded", "nothing is recorded yet", "Ask after the block has ended.")
        return self._last.trace.recorded

    @property
    def plan(self) -> Plan:
        """What a scan would cost."""
        if self._plan is None:
            raise words.refuse(
                "plan", "nothing was scanned", "Use `with lm.scan(prompt) as tracer:`, then tracer.plan."
            )
        return self._plan

    def __enter__(self) -> Self:
        if self._own is not None:
            self._begin(self._own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._own is not None:
            self._end(self._own, kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(
            name, "a tracer", ("all", "invoke", "iter", "plan", "recorded", "result", "stop")
        )

    @property
    def _recording(self) -> Recording:
        return self._lm.recording

    def _record(self, prompts: Any, options: dict[str, Any]) -> Recording:
        return Recording(self._lm._served, prompts, {**self._options, **options})

    def _begin(self, recording: Recording) -> None:
        if self._lm._recording is not None:
            raise words.refuse("invoke", "an invoke inside another", "End the first block before the second.")
        self._lm._recording = recording

    def _end(self, recording: Recording, kind: type[BaseException] | None) -> None:
        self._lm._recording = None
        self._last = recording
        recording.trace.__exit__(kind)
        if kind is not None:
            return
        if self._runs:
            recording.run()
        else:
            self._plan = recording.trace.plan()


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Without what says how it is here anyway; the rest is for the native trace to judge."""
    fixed = {"remote": True, "blocking": True, "do_sample": options.get("temperature", 0.0) > 0.0}
    for name, only in fixed.items():
        if name in options and options[name] is not only:
            step = {
                "remote": "Every trace runs on the server.",
                "blocking": "t.run() of a native trace gives a job.",
            }
            default = "Sampling follows temperature: above 0 samples, 0 is greedy."
            raise words.refuse(name, f"{name}={options[name]!r}", step.get(name, default))
    return {k: v for k, v in options.items() if k not in fixed}


class Invoke:
    """The block of one invoke."""

    def __init__(self, tracer: Tracer, recording: Recording) -> None:
        self._tracer = tracer
        self._recording = recording

    def __enter__(self) -> Tracer:
        self._tracer._begin(self._recording)
        return self._tracer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._tracer._end(self._recording, kind)


class Iterations:
    """`tracer.iter`."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def __getitem__(self, index: Any) -> Iteration:
        if self._recording.max_new_tokens == 0:
            raise words.refuse(
                "iter", "steps of a trace without a generation", "Use lm.generate(..., max_new_tokens=n)."
            )
        steps = self._recording.every_step if index == slice(None) else Steps.of(index)
        return Iteration(self._recording, steps)


class Iteration:
    """Some steps. `with` and `for` record the block once, for all of them."""

    def __init__(self, recording: Recording, steps: Steps) -> None:
        self._recording = recording
        self._steps = steps
        self._outer = recording.steps

    def __enter__(self) -> Step:
        self._outer, self._recording.steps = self._recording.steps, self._steps
        return Step()

    def __exit__(self, *_: object) -> None:
        self._recording.steps = self._outer

    def __iter__(self) -> Iterator[Step]:
        with self as step:
            yield step


class Step(words.Elsewhere):
    """The number of a step, which has no value: the block is for all of them."""

    def _compared(self, other: object) -> Any:
        step = "Name the step: `with tracer.iter[2]:`."
        raise words.refuse("step", f"the number of a step is compared with {other!r}", step)

    __lt__ = __gt__ = __le__ = __ge__ = _compared
    __eq__ = __ne__ = _compared
    __hash__ = object.__hash__
    _instead = "Append what .save() gives to a list; its rows are those of all the steps."

    def __repr__(self) -> str:
        return "<some steps of the generation>"
