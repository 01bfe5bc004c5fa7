"""SIGHUP: a running server takes its policy file as it is now."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from trocar import errors


def reread(reload: Callable[[], None]) -> None:
    """Takes the policy file as it is now, on a thread of its own; one that cannot be used, or was not approved,
    changes nothing.
    """

    def run() -> None:
        try:
            reload()
            print("policy read again", flush=True)
        except errors.TrocarError as e:
            print(f"the policy stays as it was: {e}", file=sys.stderr, flush=True)

    threading.Thread(target=run, name="trocar-policy", daemon=True).start()
