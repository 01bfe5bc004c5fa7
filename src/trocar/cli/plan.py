"""What an operator asks a server to be: its models, its folder, its rules and its sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trocar.cli.access import Rulebook
from trocar.cli.folder import Folder
from trocar.cli.serve_options import LogLevel, Network


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an operator may set about engines; None for the default."""

    threads: int | None
    step_tokens: int | None
    kv_gib: float | None
    tenant_gib: float

    @property
    def tenant_bytes(self) -> int:
        return int(self.tenant_gib * (1 << 30))

    @property
    def kv_bytes(self) -> int | None:
        return None if self.kv_gib is None else int(self.kv_gib * (1 << 30))

    def words(self) -> Iterator[str]:
        """As options of another command."""
        named = {
            "threads": self.threads,
            "step-tokens": self.step_tokens,
            "kv-gib": self.kv_gib,
            "tenant-gib": self.tenant_gib,
        }
        for name, value in named.items():
            if value is not None:
                yield from (f"--{name}", str(value))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is served, and how."""

    models: tuple[str, ...]
    folder: Folder
    policy: Path | None
    anchors: Path | None
    sizes: Sizes
    log_level: LogLevel
    save_key: bool
    network: Network | None = None

    @property
    def rules(self) -> Rulebook:
        return Rulebook(self.policy or self.folder.policy, named=self.policy is not None)
