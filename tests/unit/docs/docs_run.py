"""Runs code blocks of the docs and gives back what a reader would see."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import numpy as np
from docs_desk import MODEL, Desk

import trocar

_IDS = re.compile(r"\b(act|art|job|req)_[0-9a-f]{12,}")
_KEYS = re.compile(r"(account of key )\w+")
_PORT = re.compile(r"127\.0\.0\.1:\d{4,5}")
STATEMENTS = [
    f"{subject} is {what}."
    for subject in ("The film", "This meal", "The trip", "Her book")
    for what in ("wonderful", "terrible", "delightful", "awful")
]
LABELS = [1, 0, 1, 0] * 4
# Pages whose blocks run from top to bottom and print what the page shows.
PAGES = (
    "positions.md",
    "sweeps.md",
    "sessions.md",
    "airlock.md",
    "fits.md",
    "analyses.md",
    "dictionaries.md",
)


class Clients:
    """Makes clients for the blocks of a page, which do not close what they open, and closes them all."""

    def __init__(self) -> None:
        self._made: list[trocar.Client] = []
        self._kind = trocar.Client

    def __call__(self, *args: Any, **kwargs: Any) -> trocar.Client:
        self._made.append(self._kind(*args, **kwargs))
        return self._made[-1]

    def close(self) -> None:
        for client in self._made:
            client.close()


def names(desk: Desk) -> dict[str, Any]:
    """What the examples of the error pages start from: clients, a model, stored rows, a fitted probe."""
    client = trocar.Client(desk.url, desk.researcher, quiet=True)
    model = client.model(MODEL)
    acts = model.capture(STATEMENTS, sites="resid_post.12", at=-1)
    return {
        "trocar": trocar,
        "np": np,
        "url": desk.url,
        "headers": {"Authorization": f"Bearer {desk.researcher}", "Content-Type": "application/json"},
        "client": client,
        "agent": trocar.Client(desk.url, desk.agent, quiet=True),
        "model": model,
        "acts": acts,
        "probe": acts.fit("logistic", LABELS),
    }


def run(code: str, where: str, namespace: dict[str, Any]) -> str:
    """Runs a block; its printed lines, or the refusal that ended it, without ids that change."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            exec(compile(code, where, "exec"), namespace)
    except trocar.TrocarError as e:
        shown.write(f"{e}\n")
    return steady(shown.getvalue())


def steady(text: str) -> str:
    """The text with ids, key names, ports and request numbers replaced."""
    lines = [line for line in text.splitlines() if not line.startswith("  request req_")]
    text = "\n".join(lines) + "\n"
    return _PORT.sub("127.0.0.1:9", _KEYS.sub(r"\1...", _IDS.sub(r"\1_...", text)))
