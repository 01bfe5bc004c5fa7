"""What an operator may set about engines, as words of a command line and as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an operator may set about engines; None for the default."""

    threads: int | None
    step_tokens: int | None
    kv_gib: float | None

    @property
    def kv_bytes(self) -> int | None:
        return None if self.kv_gib is None else int(self.kv_gib * (1 << 30))

    def words(self) -> Iterator[str]:
        """As options of another command."""
        named = {"threads": self.threads, "step-tokens": self.step_tokens, "kv-gib": self.kv_gib}
        for name, value in named.items():
            if value is not None:
                yield from (f"--{name}", str(value))
