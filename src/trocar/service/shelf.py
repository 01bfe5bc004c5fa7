"""What a tenant keeps here: look at it, end it. Facts come from the gate's own table; no worker is asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from trocar import errors
from trocar.gate import chain
from trocar.gate.gate import Gate
from trocar.gate.handles import Handle
from trocar.gate.keys import Principal
from trocar.gate.roles import Power
from trocar.service.ending import erase
from trocar.service.turns import Turns
from trocar.service.views import handle_view
from trocar.service.worker import Model
from trocar.wire import results as r


class Shelf:
    """The handles of one server.

    Args:
        models: served models by name.
    """

    def __init__(self, gate: Gate, models: Mapping[str, Model]) -> None:
        self._gate = gate
        self._models = models
        self._erasing = Turns(1, "trocar-erase")

    def list(self, principal: Principal) -> r.HandlesView:
        """The activations and artifacts of the caller's tenant that are within its scope."""
        self._gate.require(principal, Power.run)
        every = self._gate.handles.list(principal.tenant)
        found = tuple(handle_view(handle) for handle in every if _in_scope(principal, handle))
        return r.HandlesView(handles=found, stored_bytes=sum(view.bytes for view in found))

    def find(self, principal: Principal, handle: str) -> Handle:
        """One handle.

        Raises:
            PolicyRefusal: `not_allowed`, `out_of_scope`.
            NotFound: `handle_not_found`.
        """
        self._gate.require(principal, Power.run)
        held = self._gate.handles.find(principal.tenant, handle)
        _require_scope(principal, held)
        return held

    def erase(self, principal: Principal, handle: str) -> r.ErasedView:
        """Deletes a handle at once. Rows of secret weights go behind the answer: how long that takes, or what a worker
        says to it, is not told.

        Raises:
            PolicyRefusal: `not_allowed`, `out_of_scope`; also for a token or a key with a scope that did not make it.
            NotFound: `handle_not_found`.
        """
        held = self.find(principal, handle)
        if not principal.owns(held.tenant, held.maker):
            reason = f"{handle!r} was not made with this credential or one made from it"
            raise errors.refuse("out_of_scope", "handle", reason)
        self._gate.handles.delete(principal.tenant, handle)
        model = self._models.get(held.model)
        if model is not None:
            work = partial(erase, model.worker, principal.tenant, (handle,))
            if model.facts.open_weights:
                work()
            else:
                self._erasing.submit(principal.tenant, work)
        return r.ErasedView(handle=handle, erased=True)

    def close(self) -> None:
        """Waits until what was deleted is erased."""
        self._erasing.shutdown()


def _require_scope(principal: Principal, handle: Handle) -> None:
    sites = {f"handle[{i}]": site for i, site in enumerate(handle.shapes)}
    principal.scope.require(model=handle.model, ops={}, sites=sites, bits=0, now_ms=chain.now_ms())


def _in_scope(principal: Principal, handle: Handle) -> bool:
    with suppress(errors.PolicyRefusal):
        _require_scope(principal, handle)
        return True
    return False
