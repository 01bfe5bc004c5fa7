"""A tiny model of open weights in a cache of its own, and servers on it in one process or in three."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli_server
import httpx
from cli_server import Serving

from trocar.models import cache
from trocar.models.fingerprint import fingerprint, stamp

NAME = "tiny"
WAIT_S = 60.0


def make_model(root: Path, model: Any, tokenizer: Any, *, open_weights: bool = True) -> Path:
    """A model directory as a pull leaves it, under the cache `root`."""
    home = root / "models" / "tiny-1"
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    shutil.copy(home / "tokenizer.json", home / "tokenizer.json.tmp")
    (home / "tokenizer.json.tmp").unlink()
    parameters = sum(p.numel() for p in model.parameters())
    manifest = cache.Manifest(
        source="catalog",
        name=NAME,
        package=None,
        version=None,
        sha256=None,
        revision=None,
        fingerprint=fingerprint(home),
        stamp=stamp(home),
        license="unknown",
        lineage=NAME,
        open_weights=open_weights,
        parameters=parameters,
        weight_bits=32 * parameters,
    )
    (home / cache.MANIFEST).write_text(manifest.model_dump_json())
    return home


@dataclass(frozen=True)
class Door:
    """A server as a client of plain HTTP sees it, with one key."""

    serving: Serving

    def send(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.serving.secret}", **options.pop("headers", {})}
        return httpx.request(
            method, self.serving.url + path, json=body, headers=headers, timeout=WAIT_S, **options
        )

    def start(self, path: str, body: Any, **headers: str) -> str:
        """The job of a request."""
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        heard = self.send("POST", path, body, headers=named)
        assert heard.status_code in (200, 202), heard.text
        return str(heard.json()["job"])

    def result(self, job: str) -> httpx.Response:
        """How a job ends."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            heard = self.send("GET", f"/v1/jobs/{job}/result", params={"wait_s": "10"})
            if heard.status_code != 202:
                return heard
        raise AssertionError("the job does not end")

    def ask(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.result(self.start(path, body, **headers))

    def code(self, heard: httpx.Response) -> str:
        return str(heard.json()["error"]["refusals"][0]["code"])


@contextmanager
def serving(home: Path, model: Path, isolation: str, *words: str) -> Iterator[Door]:
    """A started server on a data folder of its own."""
    home.mkdir(exist_ok=True)
    options = ("--model", str(model), "--threads", "1", "--isolation", isolation, *words)
    started = cli_server.start(home, *options)
    try:
        yield Door(started)
    finally:
        if started.process.poll() is None:
            started.stop(signal.SIGTERM)


def children(of: int) -> dict[str, int]:
    """Process ids of the three parts that a server started, by their names."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if parent == of and "trocar.cli.app" in words:
            found[words[words.index("trocar.cli.app") + 1]] = int(stat.parent.name)
    return found


def environment(home: Path) -> dict[str, str]:
    return {**cli_server.environment(home), "TROCAR_CACHE": os.environ["TROCAR_CACHE"]}


def python() -> str:
    return sys.executable


def canonical(heard: httpx.Response) -> str:
    """An answer without what is random in it: ids of handles."""
    return json.dumps(heard.json(), sort_keys=True)
