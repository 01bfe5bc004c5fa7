"""The user's SDK config file: one server's address and key, written with mode 0600.

An entry of another server is never replaced silently, and what is replaced is kept beside it as `.old`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from trocar.client.settings import config_path, saved_entries


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether the entry was written, and the sentence that says so."""

    written: bool
    said: str


def save(url: str, api_key: str, *, replace: bool) -> Outcome:
    """Writes `url` and `api_key`.

    Args:
        url: address of the server.
        api_key: secret of a key.
        replace: also when the file holds another server's entry.
    """
    path, found = config_path(), saved_entries()
    others = sorted(found.keys() - {"url", "api_key"})
    if others:
        return Outcome(False, f"not saved: {path} holds settings of something else ({', '.join(others)})")
    if found == {"url": url, "api_key": api_key}:
        return Outcome(True, f"{path} has this key already")
    if found and found.get("url") != url and not replace:
        return Outcome(False, f"not saved: {path} holds the entry of {found.get('url')}, which stays")
    old = path.with_name(path.name + ".old")
    try:
        if os.path.lexists(path):
            path.replace(old)
        _write(path, url, api_key)
    except OSError as e:  # the key is shown all the same, and a server that is up stays up
        return Outcome(False, f"not saved: {path} cannot be written: {e.strerror}")
    if not found:
        return Outcome(True, f"saved to {path}")
    return Outcome(True, f"saved to {path}; its entry of {found.get('url')} is now in {old}")


def _write(path: Path, url: str, api_key: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as out:
        # a JSON string is a TOML basic string
        out.write(f"url = {json.dumps(url)}\napi_key = {json.dumps(api_key)}\n")
    partial.replace(path)
