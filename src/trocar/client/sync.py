"""The sync facade: the same verbs as `trocar.client.aio`, without await. A test holds the two in parity.

Each `Client` runs the async core on an event loop of its own in a background thread, so it works in scripts,
in notebooks and inside other event loops alike.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import httpx

from trocar.client import aio, tokens
from trocar.client import airlock as desk
from trocar.client.airlock import Ticket
from trocar.client.handles import Probe, Stored, StoredRows
from trocar.client.programs import model_text
from trocar.client.prompts import Prompts, generation_of
from trocar.client.results import Plan, Results, SessionResults, Text
from trocar.client.session import RecordedSession, Session
from trocar.client.trace import Recorded, Trace
from trocar.graph.builder import EditSpec, Position
from trocar.graph.facts import ModelFacts
from trocar.wire import about
from trocar.wire import airlock as a
from trocar.wire import requests as q
from trocar.wire import results as r

T = TypeVar("T")


class Portal:
    """The background event loop of one client, started when first needed; a daemon, so exit never waits."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()  # threads share a client, and its connections belong to one loop

    def call(self, verb: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        future = asyncio.run_coroutine_threadsafe(verb(*args, **kwargs), self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        with self._starting:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), name="trocar-client", daemon=True).start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


class Job(Generic[T]):
    """A job on the server; `job.result()` waits."""

    def __init__(self, portal: Portal, job: aio.AsyncJob[Any], wrap: Callable[[Any], T]) -> None:
        self._portal = portal
        self._job = job
        self._wrap = wrap

    @property
    def id(self) -> str:
        return self._job.id

    @property
    def state(self) -> r.JobState:
        """State at the last look; `refresh` looks again."""
        return self._job.state

    def refresh(self) -> r.JobState:
        return self._portal.call(self._job.refresh)

    def result(self) -> T:
        """Waits for the result; raises what made the job fail."""
        return self._wrap(self._portal.call(self._job.result))

    def cancel(self) -> None:
        """Stops the job before its next batch."""
        self._portal.call(self._job.cancel)

    def __repr__(self) -> str:
        return repr(self._job)


@dataclass(frozen=True, slots=True)
class Activations:
    """Captured rows that stay on the server. `acts["resid_post.12"]` is a value for edits."""

    client: Client
    stored: Stored

    @property
    def handle(self) -> str:
        return self.stored.handle

    @property
    def sites(self) -> tuple[str, ...]:
        return self.stored.sites

    @property
    def rows(self) -> int:
        return self.stored.rows

    def __getitem__(self, site: str) -> StoredRows:
        return self.stored.at(site)

    def fit(
        self,
        kind: q.FitKind,
        labels: Sequence[Any] | None = None,
        *,
        target: StoredRows | None = None,
        groups: Sequence[int | str] | None = None,
        test_fraction: float = 0.25,
        seed: int = 0,
        l2: float | None = None,
        l1: float | None = None,
        class_weight: Literal["balanced"] | None = None,
        folds: int = 0,
    ) -> Probe:
        """Fits every captured site on the server; only metrics come back. See `AsyncActivations.fit`."""
        core = aio.AsyncActivations(self.client._core, self.stored)
        return self.client._portal.call(
            core.fit,
            kind,
            labels,
            target=target,
            groups=groups,
            test_fraction=test_fraction,
            seed=seed,
            l2=l2,
            l1=l1,
            class_weight=class_weight,
            folds=folds,
        )

    def request_release(self, *, reason: str, controls: str) -> Ticket:
        """Asks the airlock for the rows; see `Client.request_release`."""
        return self.client.request_release(self, reason=reason, controls=controls)

    def delete(self) -> None:
        self.client._portal.call(aio.AsyncActivations(self.client._core, self.stored).delete)

    def __repr__(self) -> str:
        return self.stored.text()

    def _repr_html_(self) -> str:
        return self.stored.html()


class Model:
    """One served model."""

    def __init__(self, client: Client, core: aio.AsyncModel) -> None:
        self._client = client
        self._core = core

    @property
    def facts(self) -> ModelFacts:
        return self._core.facts

    @property
    def name(self) -> str:
        return self._core.name

    @property
    def n_layers(self) -> int:
        return self._core.n_layers

    @property
    def d_model(self) -> int:
        return self._core.d_model

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites this model serves, without layers."""
        return self._core.sites

    def width(self, site: str) -> int:
        """Width of one row at a site."""
        return self._core.width(site)

    def trace(self, prompts: Prompts, **generation: Any) -> Trace[Plan, Job[Results[Activations]]]:
        """Opens a recording; keywords are those of `Generation` (`max_new_tokens`, `temperature`, ...)."""
        return Trace(self, self.facts, prompts, generation_of(generation))

    def plan(self, recorded: Recorded) -> Plan:
        return self._client._portal.call(self._core.plan, recorded)

    def run(self, recorded: Recorded) -> Job[Results[Activations]]:
        return self._client._wrap_job(self._client._portal.call(self._core.run, recorded))

    def session(self, *, keep: bool = False) -> Session[Job[SessionResults[Activations]]]:
        """Opens a session: programs that run one after another in one job. See `AsyncModel.session`."""
        return Session(self, self.facts, keep=keep)

    def run_session(self, recorded: RecordedSession) -> Job[SessionResults[Activations]]:
        """Submits a recorded session."""
        return self._client._wrap_job(self._client._portal.call(self._core.run_session, recorded))

    def capture(
        self,
        prompts: Prompts,
        sites: str | Sequence[str],
        *,
        at: Position = -1,
        edits: Sequence[EditSpec] = (),
    ) -> Activations:
        """Runs the prompts and stores rows on the server; nothing is downloaded. See `AsyncModel.capture`."""
        core = self._client._portal.call(self._core.capture, prompts, sites, at=at, edits=edits)
        return Activations(self._client, core.stored)

    def generate(
        self, prompts: Prompts, *, edits: Sequence[EditSpec] = (), max_new_tokens: int = 48, **generation: Any
    ) -> Text | list[Text]:
        """Generates after each prompt, with edits on prompt and generated tokens. See `AsyncModel.generate`."""
        return self._client._portal.call(
            self._core.generate, prompts, edits=edits, max_new_tokens=max_new_tokens, **generation
        )

    def tokenize(self, text: str) -> list[tuple[int, str]]:
        """Token ids with their texts, as the model sees the text."""
        return self._client._portal.call(self._core.tokenize, text)

    def __repr__(self) -> str:
        return model_text(self.facts)


class Client:
    """A connection to a Trocar server; see `AsyncClient` for the arguments."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        quiet: bool = False,
    ) -> None:
        self._portal = Portal()
        self._core = aio.AsyncClient(url, api_key, transport=transport, quiet=quiet)

    def models(self) -> tuple[ModelFacts, ...]:
        """Facts of the served models."""
        return self._portal.call(self._core.models)

    def model(self, name: str) -> Model:
        """A served model by name; `unknown_model` names the closest."""
        return Model(self, self._portal.call(self._core.model, name))

    def capabilities(self) -> about.CapabilitiesView:
        """Ops, fits, prices and engines of the server."""
        return self._portal.call(self._core.capabilities)

    def handles(self) -> tuple[r.HandleView, ...]:
        """The caller's handles."""
        return self._portal.call(self._core.handles)

    def activations(self, handle: str) -> Activations:
        """Stored activations by their id, for example after a restart."""
        return Activations(self, self._portal.call(self._core.activations, handle).stored)

    def request_release(self, handle: desk.Handled | str, *, reason: str, controls: str) -> Ticket:
        """Asks that stored rows or a fit leave, through the airlock. See `AsyncClient.request_release`."""
        core = self._portal.call(self._core.request_release, handle, reason=reason, controls=controls)
        return Ticket(self._portal, core)

    def request_raise(
        self,
        model: str,
        *,
        life_bits: int | None = None,
        day_bits: int | None = None,
        reason: str,
        controls: str,
        owner: str | None = None,
    ) -> Ticket:
        """Asks for larger limits on a model's lineage. See `AsyncClient.request_raise`."""
        core = self._portal.call(
            self._core.request_raise, model, life_bits=life_bits, day_bits=day_bits, reason=reason,
            controls=controls, owner=owner,
        )  # fmt: skip
        return Ticket(self._portal, core)

    def airlock(self, state: a.TicketState | None = None, limit: int = 100) -> tuple[Ticket, ...]:
        """The newest requests to the airlock that the key sees."""
        found = self._portal.call(self._core.airlock, state, limit)
        return tuple(Ticket(self._portal, core) for core in found)

    def ticket(self, ticket_id: str) -> Ticket:
        """One request to the airlock by its id; for reviewers with all that a decision needs."""
        return Ticket(self._portal, self._portal.call(self._core.ticket, ticket_id))

    def ledger(self) -> r.LedgerView:
        """The calling key's own account."""
        return self._portal.call(self._core.ledger)

    def token(
        self,
        *,
        models: tokens.Words = None,
        ops: tokens.Words = None,
        sites: tokens.Words = None,
        bits: int | None = None,
        expires: tokens.Until = None,
        role: Literal["agent"] | None = "agent",
    ) -> str:
        """A token that stands for the calling key with less; it is shown this once. See docs/keys.md.

        Args:
            bits: for life, on each lineage; an account of its own.
            expires: a moment with a time zone, or how long from now.
            role: `agent`, or None for a researcher.
        """
        verb = self._core.token
        return self._portal.call(
            verb, models=models, ops=ops, sites=sites, bits=bits, expires=expires, role=role
        )

    def engine(self) -> about.EngineView:
        """Batch counters; operators only."""
        return self._portal.call(self._core.engine)

    def job(self, job_id: str) -> Job[Any]:
        """A job by its id, for example after a restart of the client."""
        return self._wrap_job(self._portal.call(self._core.job, job_id))

    def close(self) -> None:
        self._portal.call(self._core.close)
        self._portal.stop()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self._core.settings.url}>"

    def _wrap_job(self, job: aio.AsyncJob[Any]) -> Job[Any]:
        return Job(self._portal, job, self._sync_results)

    def _sync_results(self, results: Results[Any] | SessionResults[Any]) -> Any:
        return results.rebind(lambda output: Activations(self, Stored.of(output)))
