"""Requests of the airlock as they are told: to their author's project without what the checks saw in numbers, to
reviewers with everything. Data in, data out.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from trocar.gate import checks
from trocar.gate.airlock_desk import Review, actor_of
from trocar.gate.airlock_records import Step, Ticket
from trocar.gate.airlock_request import ExportFacts, RaiseFacts
from trocar.gate.airlock_states import Standing, standing
from trocar.gate.checks import Part, Reason
from trocar.gate.keys import Principal
from trocar.gate.policy import Role
from trocar.gate.windows import Account
from trocar.wire import airlock as a

_REVIEWERS: Final = (Standing.owner, Standing.checker, Standing.approver)


def view(
    principal: Principal, ticket: Ticket, limit_bits: int | None, review: Review | None = None
) -> a.TicketView:
    """A request as the caller may see it.

    Args:
        limit_bits: of the lineage, for life.
        review: what a decision also needs, when it was looked up.
    """
    request, author = ticket.request, ticket.request.author
    you = standing(actor_of(principal), ticket.parties)
    whole = you in _REVIEWERS or principal.role is Role.auditor
    reasons = request.checked.reasons if whole else checks.told(request.checked.reasons)
    export = request.what if isinstance(request.what, ExportFacts) else None
    return a.TicketView(
        ticket=ticket.id,
        kind="raise" if export is None else export.kind.value,
        state=ticket.state.value,
        you=you.value,
        author=author.key_id,
        holder=author.holder,
        project=author.project,
        lineage=request.lineage.name,
        fingerprint="" if export is None else export.fingerprint,
        reason=request.reason,
        controls=request.controls,
        checks=request.checked.disposition.value,
        reasons=tuple(map(_reason, reasons)),
        needed=request.needed,
        agreed=sum(step.action == "approve" for step in ticket.steps),
        price_bits=request.price_bits,
        limit_bits=limit_bits,
        digest=ticket.digest,
        submitted=_when(request.submitted_ms),
        expires=_when(request.expires_ms),
        parts=() if export is None else tuple(_part(part, whole) for part in export.parts),
        limits=_limits(request.what) if isinstance(request.what, RaiseFacts) else None,
        steps=tuple(map(_step, ticket.steps)),
        review=_review(review) if whole and review is not None else None,
    )


def _reason(reason: Reason) -> a.ReasonView:
    return a.ReasonView(code=reason.code.value, path=reason.path, text=reason.text)


def _part(part: Part, whole: bool) -> a.PartView:
    return a.PartView(
        name=part.name,
        site=str(part.site or ""),
        origin=part.origin.value,
        label=part.label.name,
        rows=part.rows,
        width=part.width,
        blocks=part.blocks,
        first=part.first,
        texts=part.texts,
        one_hot_columns=part.numbers.one_hot_columns if whole else None,
    )


def _limits(what: RaiseFacts) -> a.RaiseView:
    return a.RaiseView(owner=what.owner, life_bits=what.limits.life_bits, day_bits=what.limits.day_bits)


def _step(step: Step) -> a.StepView:
    return a.StepView(
        step=step.action,
        state=step.state.value,
        holder=step.holder,
        role="" if step.role is None else step.role.value,
        words=step.words,
        time=_when(step.time_ms),
    )


def _review(review: Review) -> a.ReviewView:
    earlier = tuple(
        a.EarlierView(
            ticket=e.id,
            state=e.state.value,
            lineage=e.lineage,
            price_bits=e.price_bits,
            sites=e.sites,
            submitted=_when(e.submitted_ms),
        )
        for e in review.earlier
    )
    return a.ReviewView(
        lineage_left_bits=_left(review.lineage), key_left_bits=_left(review.key), earlier=earlier
    )


def _left(account: Account | None) -> int | None:
    return None if account is None else account.left_life_bits


def _when(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, tz=UTC).isoformat(timespec="seconds")
