"""What of a server's own doings goes to stderr; prompts and results never do."""

from __future__ import annotations

import logging

from trocar.cli.serve_options import LogLevel


def log_to_stderr(level: LogLevel) -> None:
    # only our own and uvicorn's: at INFO, SQLAlchemy would log the values of its statements
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("trocar", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
