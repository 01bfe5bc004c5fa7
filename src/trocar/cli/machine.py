"""The machine that something was measured on, in one line that may stand in a document: no name, no path."""

from __future__ import annotations

import os
import platform

from trocar import __version__


def described() -> str:
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {python}, Trocar {__version__}"
