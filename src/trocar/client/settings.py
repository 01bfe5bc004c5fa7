"""Where the server is and which key to use: arguments, then the environment, then the user's config file."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trocar import errors

DEFAULT_URL: Final = "http://127.0.0.1:8765"


@dataclass(frozen=True, slots=True)
class Settings:
    """Address and key; the key never shows in a repr."""

    url: str
    api_key: str | None = field(repr=False)

    @classmethod
    def find(cls, url: str | None = None, api_key: str | None = None) -> Settings:
        """Argument, then `TROCAR_URL` / `TROCAR_API_KEY`, then `~/.config/trocar/config.toml`."""
        saved = _config()
        return cls(
            (url or os.environ.get("TROCAR_URL") or saved.get("url") or DEFAULT_URL).rstrip("/"),
            api_key or os.environ.get("TROCAR_API_KEY") or saved.get("api_key"),
        )


def config_path() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME")
    return (Path(root) if root else Path.home() / ".config") / "trocar" / "config.toml"


def saved_entries() -> dict[str, Any]:
    """What the config file holds; nothing when there is none, or it lies where this user may not look: then it is
    somebody else's, as after `runuser`, which keeps HOME.

    Raises:
        ClientError: `bad_argument` when it is not TOML.
    """
    path = config_path()
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise errors.refuse("bad_argument", str(path), f"the config file is not TOML: {e}") from None


def _config() -> dict[str, str]:
    return {k: v for k, v in saved_entries().items() if isinstance(v, str)}
