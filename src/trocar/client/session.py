"""`with model.session() as s:` records programs that run one after another in one job.

    with s.trace(clean) as first:
        first.save("kept", first.capture(first.resid_post[5][-1]))
    with s.trace(other) as second:
        second.resid_post[5][-1] = first["kept"]
        second.save("lp", second.logprobs([" Paris"]))
    results = s.run().result()          results[1]["lp"]

What a step captures exists on the server only, and until the session ends unless it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from trocar import errors, strict
from trocar.client.handles import StoredRows
from trocar.client.prompts import Prompts, generation_of
from trocar.client.trace import Recorded, Trace
from trocar.graph import ops
from trocar.graph.builder import Position
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Node
from trocar.wire.requests import SessionRequest

JobT = TypeVar("JobT", covariant=True)


@dataclass(frozen=True, slots=True)
class RecordedSession:
    """A finished session: what is sent, and the arrays beside it."""

    request: SessionRequest
    vectors: dict[str, npt.NDArray[np.float32]]


class SessionRunner(Protocol[JobT]):
    """What a session needs of a model, sync or async."""

    def run_session(self, recorded: RecordedSession) -> JobT: ...


@dataclass(frozen=True, slots=True)
class Promised:
    """What an earlier step will have captured: a value for edits of later steps. `promised[site]` names a site."""

    handle: str
    sites: tuple[str, ...]

    def __getitem__(self, site: str) -> StoredRows:
        if site not in self.sites:
            near = errors.closest(site, self.sites)
            raise errors.refuse(
                "wrong_handle", self.handle, f"{self.handle} captures no {site!r}", closest=near
            )
        return StoredRows(self.handle, site)

    def rows(self, *, prompts: Sequence[int] | None = None, at: Position = "prompt[*]") -> StoredRows:
        """Some of the captured rows, where one site was captured; see `StoredRows.rows`."""
        return self._one(None).rows(prompts=prompts, at=at)

    def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
        """The rows of the site where they are used, or of the only one that was captured."""
        return self._one(site).operand(node_id, site)

    def _one(self, used: str | None) -> StoredRows:
        if len(self.sites) == 1:
            return StoredRows(self.handle, self.sites[0])
        if used not in self.sites:
            reason = f"{self.handle} holds {len(self.sites)} sites: name one, [{self.sites[0]!r}]"
            raise errors.refuse("bad_argument", self.handle, reason)
        return StoredRows(self.handle, used)


class StepTrace(Trace[NoReturn, NoReturn]):
    """A trace that is one step of a session; the session runs it."""

    def __init__(
        self, runner: _Nobody, index: int, model: ModelFacts, prompts: Prompts, **generation: Any
    ) -> None:
        super().__init__(runner, model, prompts, generation_of(generation))
        self._index = index

    def __getitem__(self, name: str) -> Promised:
        """What this step captures under a name, as a value for later steps."""
        nodes = {n.id: n for n in self._recorder._nodes}
        captures = [n.id for n in nodes.values() if isinstance(n, ops.Capture)]
        found = nodes.get(name)
        if not isinstance(found, ops.Capture):
            raise errors.refuse(
                "bad_argument", name, f"step {self._index} captures nothing under {name!r}",
                closest=errors.closest(name, captures),
                next_step=f"Save t.capture(...) under this name; there are {captures}.",
            )  # fmt: skip
        sites = tuple(str(getattr(nodes[ref], "site", ref)) for ref in found.of)
        return Promised(f"step{self._index}.{name}", sites)


class _Nobody:
    """Refuses to run a step alone."""

    def plan(self, _recorded: Recorded) -> NoReturn:
        raise self._refused()

    def run(self, _recorded: Recorded) -> NoReturn:
        raise self._refused()

    def _refused(self) -> errors.TrocarError:
        return errors.refuse(
            "bad_argument", "trace", "this trace is a step of a session and does not run alone",
            next_step="Run the session: s.run().",
        )  # fmt: skip


class Session(Generic[JobT]):
    """A recording of several programs on one model."""

    def __init__(self, runner: SessionRunner[JobT], model: ModelFacts, *, keep: bool = False) -> None:
        self._runner = runner
        self._model = model
        self._keep = keep
        self._steps: list[StepTrace] = []
        self._failed = False

    def trace(self, prompts: Prompts, **generation: Any) -> StepTrace:
        """Opens the recording of the next step; see `model.trace`."""
        step = StepTrace(_Nobody(), len(self._steps), self._model, prompts, **generation)
        self._steps.append(step)
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None

    @property
    def recorded(self) -> RecordedSession:
        """The request as it would be sent."""
        if self._failed:
            reason = "the session's block raised, so what it recorded is incomplete"
            raise errors.refuse("bad_argument", "session", reason)
        if not self._steps:
            raise errors.refuse(
                "bad_argument", "session", "the session has no step",
                next_step="Record one: with s.trace(prompts) as t: ...",
            )  # fmt: skip
        steps = [step.recorded for step in self._steps]
        vectors = {f"step{i}.{name}": v for i, step in enumerate(steps) for name, v in step.vectors.items()}
        request = strict.make(SessionRequest, steps=tuple(s.request for s in steps), keep=self._keep)
        return RecordedSession(request, vectors)

    def run(self) -> JobT:
        """Submits the session; every step is checked and priced before the first one runs."""
        return self._runner.run_session(self.recorded)

    def __repr__(self) -> str:
        return "\n".join(
            [f"Session on {self._model.name}, {len(self._steps)} steps", *map(repr, self._steps)]
        )
