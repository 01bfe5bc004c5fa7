"""The refusal that every part of a ledger may have to give."""

from __future__ import annotations

from trocar import errors


def unavailable(why: str) -> errors.TrocarError:
    """The refusal for a ledger that cannot be trusted with a charge now."""
    return errors.refuse("ledger_unavailable", "", f"the ledger cannot be used: {why}")
