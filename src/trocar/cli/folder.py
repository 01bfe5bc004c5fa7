"""The data folder of a server: where its ledger and its store are. It opens neither.

`--data`, else `TROCAR_DATA`, else the user's data folder. `TROCAR_LEDGER` is the URL of a ledger that is not
in the folder (`postgresql+psycopg://...`); it is no option, because it may hold a password.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from trocar import errors

LEDGER_URL: Final = "TROCAR_LEDGER"
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", envvar="TROCAR_DATA", help="Folder of ledger and store; the user's data folder by default."
    ),
]


@dataclass(frozen=True, slots=True)
class Folder:
    """The paths in one data folder; nothing is made until `make`."""

    root: Path

    @classmethod
    def at(cls, data: Path | None) -> Folder:
        if data is None:
            import platformdirs

            data = Path(platformdirs.user_data_dir("trocar"))
        return cls(data.expanduser().absolute())

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.db"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def policy(self) -> Path:
        return self.root / "policy.toml"

    @property
    def anchors(self) -> Path:
        """Beside the folder, not in it: a backup of the folder must not bring its own anchors back."""
        return self.root.with_name(f"{self.root.name}.anchors")

    @property
    def token_root(self) -> Path:
        """The secret that signs first tokens; see `gate/tokens.py`."""
        return self.root / "tokens.key"

    @property
    def ledger_url(self) -> str:
        return os.environ.get(LEDGER_URL) or f"sqlite:///{self.ledger}"

    @property
    def has_ledger(self) -> bool:
        """Whether there is a ledger to look at; one on a server is taken to be there."""
        return bool(os.environ.get(LEDGER_URL)) or self.ledger.is_file()

    def make(self) -> None:
        """Makes the folder, readable by its owner only.

        Raises:
            ClientError: `data_unwritable`.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            reason = f"{str(self.root)!r} cannot be made: {e.strerror}"
            raise errors.refuse("data_unwritable", "data", reason) from None
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise errors.refuse("data_unwritable", "data", f"{str(self.root)!r} cannot be written")

    def require_ledger(self) -> None:
        """Refuses a folder without a ledger, so that a misspelt --data is not answered with an empty one.

        Raises:
            NotFound: `no_ledger`.
        """
        if not self.has_ledger:
            raise errors.refuse("no_ledger", "data", f"there is no {str(self.ledger)!r}")
