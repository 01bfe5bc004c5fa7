"""How many bytes one owner may keep: a number, and the refusal when a write would exceed it.

What counts is every listed file of the owner's handles and artifacts, headers and sidecars included. Buffers
of open writers do not count until they are committed. This module knows nothing of the disk's own limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog


@dataclass(frozen=True, slots=True)
class Quota:
    """`limit_bytes` for each owner; None for no limit."""

    limit_bytes: int | None

    def admit(self, c: sa.Connection, owner: str, more_bytes: int) -> None:
        """Raises `disk_full` when `owner` would have more than the limit after `more_bytes`."""
        if self.limit_bytes is None:
            return
        used = catalog.usage_bytes(c, owner)
        if used + more_bytes > self.limit_bytes:
            reason = f"{used} of your {self.limit_bytes} bytes are used, and this needs {more_bytes} more"
            raise errors.refuse("disk_full", "", reason)
