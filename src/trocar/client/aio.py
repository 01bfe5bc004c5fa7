"""The async client: the one core that talks to a server. `trocar.client.sync` is its facade, verb by verb."""

from __future__ import annotations

from collections.abc import Awaitable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import httpx

from trocar import aliases, errors, strict
from trocar.client import airlock as desk
from trocar.client.airlock import AsyncTicket
from trocar.client.handles import Probe, Stored, StoredRows
from trocar.client.notebook import ProgressLine
from trocar.client.programs import capture_request, fit_request, generate_request, model_text
from trocar.client.prompts import Prompts, generation_of, is_single
from trocar.client.results import Plan, Results, SessionResults, Text
from trocar.client.session import RecordedSession, Session
from trocar.client.settings import Settings
from trocar.client.tokens import AsyncTokens
from trocar.client.trace import Recorded, Trace
from trocar.client.transport import Transport
from trocar.graph.builder import EditSpec, Position
from trocar.graph.facts import ModelFacts
from trocar.wire import about
from trocar.wire import airlock as a
from trocar.wire import requests as q
from trocar.wire import results as r

POLL_S = 20.0
LOOK_S = 0.5  # while somebody watches the progress line
T = TypeVar("T")


class AsyncJob(Generic[T]):
    """A job on the server; `await job.result()` or `await job`."""

    def __init__(self, client: AsyncClient, view: r.JobView, finish: Any) -> None:
        self._client = client
        self._view = view
        self._finish = finish
        self._result: T | None = None

    @property
    def id(self) -> str:
        return self._view.job

    @property
    def state(self) -> r.JobState:
        """State at the last look; `refresh` looks again."""
        return self._view.state

    async def refresh(self) -> r.JobState:
        self._view = (await self._client.transport.get(f"/v1/jobs/{self.id}")).view(r.JobView)
        return self._view.state

    async def result(self) -> T:
        """Waits for the result.

        Raises:
            TrocarError: what made the job fail, as the class that names it.
        """
        line = ProgressLine(quiet=self._client.quiet)
        while self._result is None:
            answer = await self._client.transport.get(
                f"/v1/jobs/{self.id}/result", wait_s=LOOK_S if line.live else POLL_S
            )
            if answer.status == 200:
                self._result = self._finish(answer)
                self._view = self._view.model_copy(update={"state": "COMPLETED", "done": self._view.total})
            else:
                self._view = answer.view(r.JobView)
            line.show(self._view)
        return self._result

    async def cancel(self) -> None:
        """Stops the job before its next batch."""
        await self._client.transport.delete(f"/v1/jobs/{self.id}")

    def __await__(self) -> Generator[Any, None, T]:
        return self.result().__await__()

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state} {self._view.done}/{self._view.total}>"


@dataclass(frozen=True, slots=True)
class AsyncActivations:
    """Captured rows that stay on the server. `acts["resid_post.12"]` is a value for edits."""

    client: AsyncClient
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

    async def fit(
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
        """Fits every captured site on the server; only metrics come back. See docs/fits.md.

        Args:
            kind: `logistic` (Alain & Bengio 2016), `mean_diff` (Marks & Tegmark 2023), `ridge`, `lda`, `multinomial`
                or `linear_map` (to the rows of `target`; refused where the weights are a secret).
            labels: one per prompt, in prompt order; not for a linear map.
            target: `acts["mlp_out.3"]` of other activations of the same prompts.
            groups: one per prompt; a group never stands on both sides of the split.
            test_fraction: held-out part.
            folds: of a cross-validation, 2 to 20, beside the held-out part.

        Raises:
            ProgramError: `bad_labels`, `too_few_rows`.
        """
        request = fit_request(
            self.handle, kind, labels, target, groups,
            test_fraction=test_fraction, seed=seed, l2=l2, l1=l1, class_weight=class_weight, folds=folds,
        )  # fmt: skip
        view = (await self.client.transport.post("/v1/fits", request, once=True)).view(r.JobView)
        results: Results[Any] = await self.client._job(view)
        probe: Probe = results["fit"]
        return probe

    async def request_release(self, *, reason: str, controls: str) -> AsyncTicket:
        """Asks the airlock for the rows; see `AsyncClient.request_release`."""
        return await self.client.request_release(self, reason=reason, controls=controls)

    async def delete(self) -> None:
        await self.client.transport.delete(f"/v1/handles/{self.handle}")

    def __repr__(self) -> str:
        return self.stored.text()

    def _repr_html_(self) -> str:
        return self.stored.html()


class AsyncModel:
    """One served model."""

    def __init__(self, client: AsyncClient, facts: ModelFacts) -> None:
        self._client = client
        self.facts = facts

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def n_layers(self) -> int:
        return self.facts.n_layers

    @property
    def d_model(self) -> int:
        return self.facts.d_model

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites this model serves, without layers."""
        return self.facts.sites

    def width(self, site: str) -> int:
        """Width of one row at a site."""
        return self.facts.width(aliases.resolve(site, self.facts))

    def trace(
        self, prompts: Prompts, **generation: Any
    ) -> Trace[Awaitable[Plan], Awaitable[AsyncJob[Results[AsyncActivations]]]]:
        """Opens a recording; keywords are those of `Generation` (`max_new_tokens`, `temperature`, ...)."""
        return Trace(self, self.facts, prompts, generation_of(generation))

    async def plan(self, recorded: Recorded) -> Plan:
        answer = await self._client.transport.post("/v1/plan", recorded.request, recorded.vectors)
        return Plan(answer.view(r.PlanView))

    async def run(self, recorded: Recorded) -> AsyncJob[Results[AsyncActivations]]:
        answer = await self._client.transport.post("/v1/runs", recorded.request, recorded.vectors, once=True)
        return self._client._job(answer.view(r.JobView))

    def session(
        self, *, keep: bool = False
    ) -> Session[Awaitable[AsyncJob[SessionResults[AsyncActivations]]]]:
        """Opens a session: programs that run one after another in one job; see docs/sessions.md.

        Args:
            keep: whether captures stay on the server as handles when the session ends.
        """
        return Session(self, self.facts, keep=keep)

    async def run_session(self, recorded: RecordedSession) -> AsyncJob[SessionResults[AsyncActivations]]:
        """Submits a recorded session."""
        answer = await self._client.transport.post(
            "/v1/sessions", recorded.request, recorded.vectors, once=True
        )
        return self._client._job(answer.view(r.JobView))

    async def capture(
        self,
        prompts: Prompts,
        sites: str | Sequence[str],
        *,
        at: Position = -1,
        edits: Sequence[EditSpec] = (),
    ) -> AsyncActivations:
        """Runs the prompts and stores rows on the server; nothing is downloaded.

        Args:
            sites: `resid_post.12`, `resid_post.*` for every layer, or several of them.
            at: index, slice or selector; the default is the last prompt token.
        """
        recorded = capture_request(self, prompts, sites, at, edits)
        results = await (await self.run(recorded)).result()
        activations: AsyncActivations = results["activations"]
        return activations

    async def generate(
        self, prompts: Prompts, *, edits: Sequence[EditSpec] = (), max_new_tokens: int = 48, **generation: Any
    ) -> Text | list[Text]:
        """Generates after each prompt, with edits on prompt and generated tokens.

        Returns:
            One `Text` for one prompt given as a string or as one conversation, else a list.
        """
        recorded = generate_request(self, prompts, edits, {"max_new_tokens": max_new_tokens, **generation})
        results = await (await self.run(recorded)).result()
        texts: list[Text] = results["text"]
        return texts[0] if is_single(prompts) else texts

    async def tokenize(self, text: str) -> list[tuple[int, str]]:
        """Token ids with their texts, as the model sees the text."""
        request = strict.make(q.TokenizeRequest, model=self.name, texts=(text,))
        view = (await self._client.transport.post("/v1/tokenize", request)).view(r.TokensView)
        return list(zip(view.ids[0], view.texts[0], strict=True))

    def __repr__(self) -> str:
        return model_text(self.facts)


class AsyncClient(AsyncTokens):
    """A connection to a Trocar server.

    Args:
        url: default `TROCAR_URL`, the config file, then http://127.0.0.1:8765.
        api_key: default `TROCAR_API_KEY`, then the config file. Never shown.
        transport: an httpx transport, to drive a server in-process.
        quiet: no progress line.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        quiet: bool = False,
    ) -> None:
        self.settings = Settings.find(url, api_key)
        self.transport = Transport(self.settings, transport)
        self.quiet = quiet

    async def models(self) -> tuple[ModelFacts, ...]:
        """Facts of the served models."""
        return (await self.transport.get("/v1/models")).view(about.ModelsView).models

    async def model(self, name: str) -> AsyncModel:
        """A served model by name.

        Raises:
            NotFound: `unknown_model`, with the closest name.
        """
        served = {m.name: m for m in await self.models()}
        if name not in served:
            near = errors.closest(name, served)
            raise errors.refuse(
                "unknown_model", "model", f"{self.settings.url} does not serve {name!r}", closest=near
            )
        return AsyncModel(self, served[name])

    async def capabilities(self) -> about.CapabilitiesView:
        """Ops, fits, prices and engines of the server."""
        return (await self.transport.get("/v1/capabilities")).view(about.CapabilitiesView)

    async def handles(self) -> tuple[r.HandleView, ...]:
        """The caller's handles."""
        return (await self.transport.get("/v1/handles")).view(r.HandlesView).handles

    async def activations(self, handle: str) -> AsyncActivations:
        """Stored activations by their id, for example after a restart."""
        view = (await self.transport.get(f"/v1/handles/{handle}")).view(r.HandleView)
        return AsyncActivations(self, Stored.of(view))

    async def request_release(self, handle: desk.Handled | str, *, reason: str, controls: str) -> AsyncTicket:
        """Asks that stored rows or a fit leave the server, through the airlock; see docs/airlock.md.

        Args:
            handle: activations, a probe, or an id.
            reason: what the numbers are needed for; people read it.
            controls: what keeps them safe after they left.

        Raises:
            PolicyRefusal: `export_refused` when the automatic checks fail.
        """
        request = strict.make(a.ExportRequest, handle=desk.id_of(handle), reason=reason, controls=controls)
        return AsyncTicket(self, await desk.posted(self, "exports", request, once=True))

    async def request_raise(
        self,
        model: str,
        *,
        life_bits: int | None = None,
        day_bits: int | None = None,
        reason: str,
        controls: str,
        owner: str | None = None,
    ) -> AsyncTicket:
        """Asks for larger limits on a model's lineage; two people must agree, one of them an owner.

        Args:
            life_bits, day_bits: the new limits; None leaves one as it is.
            owner: `project:...` or another account; the calling key's by default.
        """
        request = strict.make(
            a.RaiseRequest, model=model, life_bits=life_bits, day_bits=day_bits, reason=reason,
            controls=controls, owner=owner,
        )  # fmt: skip
        return AsyncTicket(self, await desk.posted(self, "raises", request))

    async def airlock(self, state: a.TicketState | None = None, limit: int = 100) -> tuple[AsyncTicket, ...]:
        """The newest requests to the airlock that the key sees."""
        answer = await self.transport.get("/v1/airlock", state=state, limit=limit)
        return tuple(AsyncTicket(self, view) for view in answer.view(a.TicketsView).tickets)

    async def ticket(self, ticket_id: str) -> AsyncTicket:
        """One request to the airlock by its id; for reviewers with all that a decision needs."""
        return AsyncTicket(self, await desk.looked_up(self, ticket_id))

    async def ledger(self) -> r.LedgerView:
        """The calling key's own account."""
        return (await self.transport.get("/v1/ledger")).view(r.LedgerView)

    async def engine(self) -> about.EngineView:
        """Batch counters; operators only."""
        return (await self.transport.get("/v1/engine")).view(about.EngineView)

    async def job(self, job_id: str) -> AsyncJob[Any]:
        """A job by its id, for example after a restart of the client."""
        return self._job((await self.transport.get(f"/v1/jobs/{job_id}")).view(r.JobView))

    async def close(self) -> None:
        await self.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.settings.url}>"

    def _job(self, view: r.JobView) -> AsyncJob[Any]:
        def finish(answer: Any) -> Results[AsyncActivations] | SessionResults[AsyncActivations]:
            if view.kind == "session":
                return SessionResults(answer.view(r.SessionResult), answer.charge(), self._bind)
            return Results(answer.view(r.RunResult), answer.charge(), self._bind)

        return AsyncJob(self, view, finish)

    def _bind(self, output: r.CaptureOutput) -> AsyncActivations:
        return AsyncActivations(self, Stored.of(output))
