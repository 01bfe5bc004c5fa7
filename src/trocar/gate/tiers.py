"""How far keys are trusted and what they are for: two sets of words. `policy` and `roles` say what they mean."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """How far a key is trusted with the secret; fixes the key's limit on every lineage."""

    open = "open"
    trusted = "trusted"
    external = "external"
    agent = "agent"


class Role(StrEnum):
    """What a key may do; the table is in `roles.py`."""

    owner = "owner"
    """Answers for the server: everything an operator and a checker may, and the policy."""
    checker = "checker"
    """Reviews what waits in the airlock; runs nothing."""
    operator = "operator"
    """Runs the server: makes and ends keys, sees the engine's counters and the log."""
    auditor = "auditor"
    """Reads the log and nothing else."""
    researcher = "researcher"
    """Runs programs."""
    agent = "agent"
    """Runs programs, unattended."""
