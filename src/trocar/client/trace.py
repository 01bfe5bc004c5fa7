"""`with model.trace(prompts) as t:` records a program; `t.plan()` prices it, `t.run()` runs it.

Attributes of a trace are the sites; methods are the outputs. Everything else is in `trocar.graph.builder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from trocar import errors, sites, strict
from trocar.graph import ops
from trocar.graph.builder import (
    EditSpec,
    Expr,
    Held,
    Position,
    Recorder,
    SiteFamily,
    SiteProxy,
    SiteRows,
    selector,
    vectors_of,
)
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation
from trocar.wire.requests import Chat, Message, Prompt, RunRequest

PlanT = TypeVar("PlanT", covariant=True)
JobT = TypeVar("JobT", covariant=True)
Prompts = (
    str
    | Sequence[str]
    | Sequence[Sequence[int]]
    | Sequence[Mapping[str, str]]
    | Sequence[Sequence[Mapping[str, str]]]
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A finished request: what is sent, and the vectors beside it."""

    request: RunRequest
    vectors: dict[str, npt.NDArray[np.float32]]


class Runner(Protocol[PlanT, JobT]):
    """What a trace needs of a model, sync or async."""

    def plan(self, recorded: Recorded) -> PlanT: ...

    def run(self, recorded: Recorded) -> JobT: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """An output that was made inside `t.save(name, ...)`'s argument, waiting for its name."""

    kind: type[Any]
    fields: dict[str, Any]


class Trace(Generic[PlanT, JobT]):
    """A recording. Sites are attributes: `t.resid_post[12][-1]`; outputs are saved by name.

    Raises:
        NoSuchSite: for an attribute that is no site, with the closest spelling.
    """

    def __init__(
        self, runner: Runner[PlanT, JobT], model: ModelFacts, prompts: Prompts, generation: Generation
    ) -> None:
        self._runner = runner
        self._model = model
        self._prompts = prompt_tuple(prompts)
        self._generation = generation
        self._recorder = Recorder(model)
        self._failed = False

    # ---- sites ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._recorder.at_site(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if isinstance(self._recorder.at_site(name), SiteProxy):
            raise errors.refuse("bad_argument", name, f"t.{name} needs a layer: t.{name}[12] = ...")
        self._recorder.assign(name, "all", value)

    def __dir__(self) -> Iterable[str]:
        return [*object.__dir__(self), *self._model.sites]

    # ---- edits ----

    def apply(self, *edits: EditSpec) -> None:
        """Records edits made with `trocar.edit`."""
        for edit in edits:
            self._recorder.apply(edit)

    def vector(self, value: Any, site: str | None = None) -> Expr:
        """A constant: float array [width], a fitted direction or stored rows."""
        return Expr(self._recorder, self._recorder.value(value, site))

    # ---- outputs ----

    def lens(self, of: SiteRows | SiteFamily | Expr | Sequence[Expr], *, top_k: int = 5) -> Saved:
        """Logit lens (nostalgebraist 2020): top-k next tokens of each row, with log-probabilities in nats."""
        rows = [of] if isinstance(of, Expr) else list(of)
        return Saved(ops.Lens, {"of": tuple(x.id for x in rows), "top_k": top_k})

    def logprobs(self, tokens: Sequence[Any], *, at: Position = -1) -> Saved:
        """Log-probabilities of named next tokens; a list for all prompts, or one list per prompt."""
        nested = any(isinstance(t, list | tuple) for t in tokens)
        fixed = tuple(tuple(t) for t in tokens) if nested else tuple(tokens)
        return Saved(ops.Logprobs, {"at": selector(at), "tokens": fixed})

    def score(self, of: Expr, probe: Held | None = None) -> Saved:
        """One number per row: a dot product, or a fitted probe's logit on the rows of its site."""
        if probe is None:
            return Saved(ops.Score, {"of": of.id})
        site = of.site if isinstance(of, SiteRows) else None
        node, _ = probe.operand("probe", site)
        if not isinstance(node, ops.Vector):
            raise errors.refuse("bad_argument", "probe", f"{probe!r} is not a fitted probe")
        return Saved(ops.Score, {"of": of.id, "probe": node.handle, "site": node.site})

    def capture(self, of: SiteRows | SiteFamily | Sequence[SiteRows]) -> Saved:
        """Writes rows to the store; the result is a handle."""
        rows = [of] if isinstance(of, Expr) else list(of)
        return Saved(ops.Capture, {"of": tuple(x.id for x in rows)})

    def text(self) -> Saved:
        """The generated text."""
        return Saved(ops.Text, {})

    def save(self, name: str, what: Saved) -> None:
        """Names an output; `job.result()[name]` will hold it.

        Raises:
            ClientError: `not_here` for a bare value: raw rows stay on the server.
        """
        if isinstance(what, Expr | SiteProxy | SiteFamily):
            raise errors.refuse(
                "not_here", name, "raw activations do not leave the server",
                next_step="Save t.lens(...), t.score(...) or t.capture(...) of it instead.",
            )  # fmt: skip
        if not isinstance(what, Saved):
            raise errors.refuse("bad_argument", name, f"{what!r} is not an output of this trace")
        self._recorder.output(name, what.kind, **what.fields)

    # ---- running ----

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None
        self._recorder.close()

    @property
    def recorded(self) -> Recorded:
        """The request as it would be sent."""
        if self._failed:
            raise errors.refuse(
                "bad_argument", "trace", "the trace's block raised, so what it recorded is incomplete"
            )
        program = self._recorder.build()
        request = strict.make(
            RunRequest,
            model=self._model.name,
            prompts=self._prompts,
            program=program,
            generation=self._generation,
        )
        vectors = {k: as_vector(k, v) for k, v in vectors_of(self._recorder, program).items()}
        return Recorded(request, vectors)

    def plan(self) -> PlanT:
        """Shapes, cost and bits out; nothing runs and nothing is spent."""
        return self._runner.plan(self.recorded)

    def run(self) -> JobT:
        """Submits the program."""
        return self._runner.run(self.recorded)

    def __repr__(self) -> str:
        nodes = self._recorder._nodes
        lines = [f"{n.id:>8}  {n.op:<16} {_fields(n)}" for n in nodes] or ["  (nothing recorded)"]
        return "\n".join([f"Trace on {self._model.name}, {len(self._prompts)} prompts", *lines])


def _fields(node: Any) -> str:
    return "  ".join(f"{k}={v!r}" for k, v in node if k not in ("id", "op"))[:90]


def prompt_tuple(prompts: Prompts) -> tuple[Prompt, ...]:
    """Texts, lists of token ids, or conversations, as the wire wants them.

    One text is one prompt; a list of `{"role": ..., "content": ...}` is one conversation.
    """
    if isinstance(prompts, str):
        return (prompts,)
    if prompts and isinstance(prompts[0], Mapping):
        return (_prompt(prompts),)
    return tuple(_prompt(p) for p in prompts)


def is_single(prompts: Prompts) -> bool:
    """Whether one prompt was given alone, not in a list: a text, or one conversation."""
    return isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], Mapping))


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        return Chat(messages=tuple(strict.make(Message, **m) for m in prompt))
    return tuple(int(i) for i in prompt)


def as_vector(name: str, value: Any) -> npt.NDArray[np.float32]:
    """A local array as float32 [width].

    Raises:
        ClientError: `bad_argument` if it is not a rank-1 array of numbers.
    """
    detached = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        vector = np.asarray(detached, dtype=np.float32)
    except (TypeError, ValueError) as e:
        raise errors.refuse("bad_argument", name, f"not an array of numbers: {e}") from None
    if vector.ndim != 1:
        raise errors.refuse("bad_argument", name, f"shape {vector.shape}; a vector has shape [width]")
    return vector


def place(site: str, model: ModelFacts) -> sites.Site:
    """Parses a site and checks it against the model's facts."""
    found = sites.parse(site)
    model.require(found, "site")
    return found
