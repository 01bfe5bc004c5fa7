"""Which policy holds: every change of it is an entry of the log, and one that loosens anything needs two people.

The first policy of a ledger is taken as it is. A later one may be tighter without asking. If any setting is looser
(`policy_file.changes` says which), two holders must have approved exactly that policy, by its digest, an owner
among them; otherwise the server does not start, and the budget that somebody wanted to widen alone stays as it was.
An approval is good for one change: a policy that was tightened since is not loosened again by what was said before.
"""

from __future__ import annotations

import json
from typing import Final

from sqlalchemy import Connection, func, select

from trocar import errors
from trocar.gate import chain, keys, policy_file, roles
from trocar.gate.chain import Kind
from trocar.gate.database import Database
from trocar.gate.keys import Principal
from trocar.gate.policy import Policy, Role
from trocar.gate.policy_file import Change
from trocar.gate.roles import Power
from trocar.gate.tables import LOG

APPROVERS: Final = 2


def current(connection: Connection) -> Policy | None:
    """The policy of the last entry that says one; None in a new ledger.

    Raises:
        ProgramError: `bad_policy` when that entry was written by a version that knows other settings.
    """
    query = select(LOG.c.detail).where(LOG.c.kind == Kind.policy_changed).order_by(LOG.c.seq.desc()).limit(1)
    detail = connection.execute(query).scalar_one_or_none()
    return None if detail is None else policy_file.from_json(json.loads(detail)["policy"])


def adopt(database: Database, policy: Policy) -> tuple[Change, ...]:
    """Makes a policy the one that holds; gives the changes. The same policy again changes nothing.

    Raises:
        PolicyRefusal: `policy_loosened`, one refusal for each setting that is looser and was not approved;
            `limit_changed` for another `lineage_tier`, which is fixed when a ledger first meets a secret.
        ProgramError: `bad_policy` when the last policy cannot be read, and this one was not approved either.
    """
    with database.write() as connection:
        was = _last(connection, policy)
        changed = () if was is None else policy_file.changes(was, policy)
        if was is not None and was.data.lineage_tier != policy.data.lineage_tier:
            raise _fixed(was, policy)
        loose = [change for change in changed if change.looser]
        if loose and not _approved(connection, policy):
            raise errors.PolicyRefusal([_loosened(change, policy) for change in loose[:20]])
        if was is None or changed:
            detail: dict[str, str] = {"policy": policy.model_dump_json()}
            chain.append(
                connection, Kind.policy_changed, digest=policy.digest(), detail=detail, time_ms=chain.now_ms()
            )
        return changed


def _last(connection: Connection, policy: Policy) -> Policy | None:
    """The policy to compare with; one that nobody can read any more is replaced by an approved one only."""
    try:
        return current(connection)
    except errors.ProgramError:
        if _approved(connection, policy):
            return None
        raise


def _fixed(was: Policy, policy: Policy) -> errors.TrocarError:
    reason = f"lineage_tier was {was.data.lineage_tier!r} and would be {policy.data.lineage_tier!r}"
    step = "Change the fractions of the tier instead; another lineage_tier needs a new ledger."
    return errors.refuse("limit_changed", "data.lineage_tier", reason, next_step=step)


def approve(database: Database, principal: Principal, policy: Policy) -> int:
    """Enters that somebody agrees to a policy; gives how many have. Twice is once.

    Raises:
        PolicyRefusal: `not_allowed` for a role that neither reviews nor changes the policy.
        AuthError: `bad_key`.
    """
    power = Power.change_policy if principal.role is Role.owner else Power.review
    roles.require(principal.role, power)
    with database.write() as connection:
        keys.require_current(connection, principal)
        found = _approvals(connection, policy)
        said = found.get(principal.holder)
        if said is None or (principal.role is Role.owner and said is not Role.owner):
            detail: dict[str, str] = {"holder": principal.holder, "role": principal.role.value}
            chain.append(
                connection,
                Kind.policy_approved,
                key_id=principal.key_id,
                digest=policy.digest(),
                detail=detail,
                time_ms=chain.now_ms(),
            )
        return len({*found, principal.holder})


def _approvals(connection: Connection, policy: Policy) -> dict[str, Role]:
    """Roles by holder, of everybody who agreed to exactly this policy since the last one was taken."""
    changed = select(func.coalesce(func.max(LOG.c.seq), 0)).where(LOG.c.kind == Kind.policy_changed)
    query = select(LOG.c.detail).where(
        LOG.c.kind == Kind.policy_approved,
        LOG.c.digest == policy.digest(),
        LOG.c.seq > changed.scalar_subquery(),
    )
    told = [json.loads(detail) for detail in connection.execute(query.order_by(LOG.c.seq)).scalars()]
    return {t["holder"]: Role(t["role"]) for t in told}


def _approved(connection: Connection, policy: Policy) -> bool:
    found = _approvals(connection, policy)
    return len(found) >= APPROVERS and Role.owner in found.values()


def _loosened(change: Change, policy: Policy) -> errors.Refusal:
    reason = f"{change.path} was {change.was!r} and would be {change.now!r}, which lets more leave"
    return errors.refusal(
        "policy_loosened", change.path, reason,
        next_step=f"Two people approve the policy {policy.digest()[:12]}: `trocar policy approve FILE`, an owner "
        "among them.",
    )  # fmt: skip
