"""What a process of a server owes to the one that started it: to say when it is ready, and to end when that ends.

The parent holds the other end of our standard input. It writes nothing; when it is gone, for whatever reason, the
input ends and so do we. Ready is one byte on a pipe that the parent reads.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Annotated, Final

import typer

READY: Final = b"+"
ALONE: Final = b"-"
"""Ready, but with the machine's network: only a worker says so."""
ReadyOption = Annotated[
    int,
    typer.Option("--ready-fd", hidden=True, help="Write a byte there when ready, and end when stdin does."),
]


def watch_parent(ready_fd: int) -> None:
    """Ends this process, as SIGTERM would, when its parent is gone; for a process that has one."""
    if ready_fd >= 0:
        threading.Thread(target=_watch, name="trocar-parent", daemon=True).start()


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def say_ready(ready_fd: int, word: bytes = READY) -> None:
    """Tells the parent, if there is one; what lives now is not walked by the cycle collector any more."""
    gc.collect()
    gc.freeze()  # at the end too, a walk over all that torch and transformers made takes seconds
    if ready_fd >= 0:
        os.write(ready_fd, word)
        os.close(ready_fd)
