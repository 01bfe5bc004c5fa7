"""Requests to the airlock seen from the client: tickets, and the files that left.

A ticket is what was told at the last look; `refresh` looks again. `approve` agrees to exactly what the ticket shows.
A file is read here without asking anybody; checking its signature needs the package `cryptography`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from trocar import errors, strict
from trocar.client.notebook import bits_text, bytes_text, html_table, text_table
from trocar.strict import Strict
from trocar.wire import airlock as a
from trocar.wire import packing, signed
from trocar.wire.results import Charge

if TYPE_CHECKING:
    from trocar.client.aio import AsyncClient
    from trocar.client.sync import Portal

Arrays = Mapping[str, npt.NDArray[np.float32]]


class Handled(Protocol):
    """Something that lives on the server under a handle: activations, a probe."""

    @property
    def handle(self) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """A file that left the server.

    Attributes:
        payload: the file: safetensors with a signed manifest.
        arrays: by name, float32 [rows, width], each number within half a step of what it was on the server.
        manifest: what the file says of itself; `verify` says whether it is true.
        charge: what the ledger said; None for a file from elsewhere.
    """

    payload: bytes = field(repr=False)
    arrays: Arrays = field(repr=False)
    manifest: Mapping[str, Any] = field(repr=False)
    charge: Charge | None = None

    @classmethod
    def of(cls, payload: bytes, charge: Charge | None = None) -> Export:
        """Reads a file.

        Raises:
            ClientError: `bad_argument` when it is not a file of an airlock.
        """
        manifest = signed.manifest_of(payload)
        try:
            tensors = load(payload)
            arrays = {part["name"]: _numbers(tensors, part, manifest["bits"]) for part in manifest["parts"]}
        except (SafetensorError, errors.TrocarError, KeyError, IndexError, TypeError, ValueError) as e:
            raise errors.refuse("bad_argument", "file", f"the file cannot be read: {e!r:.200}") from None
        return cls(payload, arrays, manifest, charge)

    def verify(self, public_key: str) -> tuple[str, ...]:
        """What is wrong with the file; empty when it is what a gate let out.

        Args:
            public_key: of that gate, from a source you trust: `client.capabilities().airlock.public_key`, or its
                operator; never from the file.

        Raises:
            ClientError: `missing_extra` without the package `cryptography`.
            ProgramError: `bad_value` for a key that is none.
        """
        return signed.verify(self.payload, public_key).faults

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        rows = [[p["name"], p["rows"], p["width"], p["origin"]] for p in self.manifest["parts"]]
        return ["part", "rows", "width", "origin"], rows

    def _title(self) -> str:
        size, bits = bytes_text(len(self.payload)), self.manifest["bits"]
        return f"Export of request {self.manifest['request'][:12]}, {size}, {bits} bits a number"

    def __repr__(self) -> str:
        return text_table(self._title(), *self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), *self._rows())


def _numbers(tensors: Mapping[str, Any], part: Mapping[str, Any], bits: int) -> npt.NDArray[np.float32]:
    codes = packing.whole(tensors[f"{part['name']}:codes"], part["width"], bits)
    steps = tensors[f"{part['name']}:scales"].astype(np.float32)
    numbers: npt.NDArray[np.float32] = (codes * steps[:, None]).astype(np.float32)
    return numbers.reshape(part["rows"], part["width"])


class AsyncTicket:
    """A request to the airlock; `await ticket.file()` once it is approved."""

    def __init__(self, client: AsyncClient, view: a.TicketView) -> None:
        self._client = client
        self._view = view

    @property
    def view(self) -> a.TicketView:
        """All that was told at the last look."""
        return self._view

    @property
    def id(self) -> str:
        return self._view.ticket

    @property
    def state(self) -> a.TicketState:
        """State at the last look; `refresh` looks again."""
        return self._view.state

    @property
    def price_bits(self) -> int:
        """What the file will be charged; 0 for a raise."""
        return self._view.price_bits

    @property
    def percent(self) -> float | None:
        """The price in percent of what the lineage may ever give; None when that is not capped."""
        limit = self._view.limit_bits
        return 100.0 * self._view.price_bits / limit if limit else None

    @property
    def reasons(self) -> tuple[a.ReasonView, ...]:
        """Why people look at it; empty when the checks found nothing."""
        return self._view.reasons

    @property
    def digest(self) -> str:
        """Of all that is decided on."""
        return self._view.digest

    async def refresh(self) -> a.TicketState:
        """Looks again, and gives the state."""
        self._view = await looked_up(self._client, self.id)
        return self._view.state

    async def sign(self) -> None:
        """Takes a request of an agent upon yourself, as a researcher of its project."""
        await self._step("sign")

    async def approve(self, words: str = "") -> None:
        """Agrees to the request as this ticket shows it, as a checker or owner who did not ask."""
        await self._step("approve", words)

    async def reject(self, words: str) -> None:
        """Ends a request that has not left; the author reads the words."""
        await self._step("reject", words)

    async def withdraw(self) -> None:
        """Takes your own request back."""
        await self._step("withdraw")

    async def apply(self) -> None:
        """Gives an account the limits that you asked for and that were approved."""
        await self._step("apply")

    async def file(self, path: str | Path | None = None) -> Export:
        """Fetches the file of an approved export: charged the first time, the same bytes for nothing after that.

        Args:
            path: where the file is written too.

        Raises:
            Conflict: `airlock_state` while it is not approved.
            PolicyRefusal: `budget_exhausted` when the budgets cannot pay it, whatever was approved.
        """
        answer = await self._client.transport.get(f"/v1/airlock/{self.id}/file")
        if path is not None:
            Path(path).write_bytes(answer.body)
        self._view = self._view.model_copy(update={"state": "released"})
        return Export.of(answer.body, answer.charge())

    async def _step(self, step: a.Step, words: str = "") -> None:
        body = strict.make(a.StepRequest, digest=self.digest, words=words)
        self._view = await posted(self._client, f"{self.id}/{step}", body)

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[Any]]]:
        told = self._view
        rows: list[list[Any]] = [["about", told.lineage], ["agreed", f"{told.agreed} of {told.needed}"]]
        if told.kind != "raise":
            share = "" if self.percent is None else f", {self.percent:.3g} % of what may ever leave"
            rows.append(["price", bits_text(told.price_bits) + share])
        rows += [[reason.code, f"{reason.path}: {reason.text}"] for reason in told.reasons]
        rows.append(["expires", told.expires])
        return f"Ticket {told.ticket} ({told.kind}): {told.state}", ["what", "told"], rows


class Ticket:
    """A request to the airlock; `ticket.file()` once it is approved."""

    def __init__(self, portal: Portal, ticket: AsyncTicket) -> None:
        self._portal = portal
        self._core = ticket

    @property
    def view(self) -> a.TicketView:
        """All that was told at the last look."""
        return self._core.view

    @property
    def id(self) -> str:
        return self._core.id

    @property
    def state(self) -> a.TicketState:
        """State at the last look; `refresh` looks again."""
        return self._core.state

    @property
    def price_bits(self) -> int:
        """What the file will be charged; 0 for a raise."""
        return self._core.price_bits

    @property
    def percent(self) -> float | None:
        """The price in percent of what the lineage may ever give; None when that is not capped."""
        return self._core.percent

    @property
    def reasons(self) -> tuple[a.ReasonView, ...]:
        """Why people look at it; empty when the checks found nothing."""
        return self._core.reasons

    @property
    def digest(self) -> str:
        """Of all that is decided on."""
        return self._core.digest

    def refresh(self) -> a.TicketState:
        """Looks again, and gives the state."""
        return self._portal.call(self._core.refresh)

    def sign(self) -> None:
        """Takes a request of an agent upon yourself, as a researcher of its project."""
        self._portal.call(self._core.sign)

    def approve(self, words: str = "") -> None:
        """Agrees to the request as this ticket shows it, as a checker or owner who did not ask."""
        self._portal.call(self._core.approve, words)

    def reject(self, words: str) -> None:
        """Ends a request that has not left; the author reads the words."""
        self._portal.call(self._core.reject, words)

    def withdraw(self) -> None:
        """Takes your own request back."""
        self._portal.call(self._core.withdraw)

    def apply(self) -> None:
        """Gives an account the limits that you asked for and that were approved."""
        self._portal.call(self._core.apply)

    def file(self, path: str | Path | None = None) -> Export:
        """Fetches the file of an approved export. See `AsyncTicket.file`."""
        return self._portal.call(self._core.file, path)

    def __repr__(self) -> str:
        return repr(self._core)

    def _repr_html_(self) -> str:
        return self._core._repr_html_()


def id_of(handle: Handled | str) -> str:
    """The id of what is named by itself or by its id."""
    return handle if isinstance(handle, str) else handle.handle


async def posted(client: AsyncClient, where: str, body: Strict, *, once: bool = False) -> a.TicketView:
    """What a request or a step gives."""
    return (await client.transport.post(f"/v1/airlock/{where}", body, once=once)).view(a.TicketView)


async def looked_up(client: AsyncClient, ticket_id: str) -> a.TicketView:
    return (await client.transport.get(f"/v1/airlock/{ticket_id}")).view(a.TicketView)
