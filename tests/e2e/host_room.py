"""A tiny model of open weights in a cache of its own, and servers on it: in one process, in three, or by hand."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli_server
import httpx
import pytest
from cli_server import Serving

from trocar.models import cache
from trocar.models.fingerprint import fingerprint, stamp

NAME = "tiny"
WAIT_S = 60.0
COME_UP_S = 180.0
_ASK = "from trocar.host.worker import cell; print('closed' if cell.can_close_network() else 'allowed')"
NETWORK = subprocess.run(
    [sys.executable, "-c", _ASK], capture_output=True, text=True, check=True
).stdout.strip()
"""What a worker on this machine can promise."""


def tree() -> Any:
    """The conftest of the whole tree: every folder's own is called the same."""
    spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def tiny_cache(root: Path) -> Iterator[Path]:
    """A cache that holds one tiny model, while it is the cache of whatever is started."""
    parts = tree()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TROCAR_CACHE", str(root))
        yield make_model(root, parts.random_llama(), parts.byte_tokenizer())


def make_model(
    root: Path, model: Any, tokenizer: Any, name: str = NAME, secret_bits: int | None = None
) -> Path:
    """A model directory as a pull leaves it, under the cache `root`; of open weights, or a secret of so many bits."""
    home = root / "models" / f"{name}-1"
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    parameters = sum(p.numel() for p in model.parameters())
    manifest = cache.Manifest(
        source="catalog",
        name=name,
        package=None,
        version=None,
        sha256=None,
        revision=None,
        fingerprint=fingerprint(home),
        stamp=stamp(home),
        license="unknown",
        lineage=name,
        open_weights=secret_bits is None,
        parameters=parameters,
        weight_bits=secret_bits or 32 * parameters,
    )
    (home / cache.MANIFEST).write_text(manifest.model_dump_json())
    return home


@dataclass(frozen=True)
class Door:
    """A server as a client of plain HTTP sees it, with one key."""

    url: str
    secret: str

    def send(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.secret}", **options.pop("headers", {})}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=WAIT_S, **options)

    def start(self, path: str, body: Any) -> str:
        """The job of a request."""
        heard = self.send("POST", path, body)
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

    def ask(self, path: str, body: Any) -> httpx.Response:
        return self.result(self.start(path, body))

    def running(self) -> bool:
        """Whether the engine has a request now."""
        heard = self.send("GET", "/v1/engine")
        return heard.status_code == 200 and heard.json()["live_requests"] > 0

    def kinds(self) -> list[tuple[str, int]]:
        """The key's entries of the log: kind and bits."""
        return [(e["kind"], e["bits"]) for e in self.send("GET", "/v1/ledger").json()["entries"]]


def code(heard: httpx.Response) -> str:
    return str(heard.json()["error"]["refusals"][0]["code"])


def until(true: Callable[[], bool], within_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.05)


@dataclass(frozen=True)
class Started:
    """A server of ours."""

    serving: Serving
    door: Door

    def key(self, tenant: str, tier: str) -> Door:
        """The door of a new key."""
        words = ("key", "create", "--tenant", tenant, "--tier", tier, "--json")
        ran = cli_server.command(self.serving.home, *words, "--data", str(self.serving.data))
        assert ran.returncode == 0, ran.stderr
        return Door(self.door.url, json.loads(ran.stdout)["secret"])

    def parts(self) -> dict[str, int]:
        """Process ids of the three parts, by their names."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
                words = (stat.parent / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if parent == self.serving.process.pid and "trocar.cli.app" in words:
                found[words[words.index("trocar.cli.app") + 1]] = int(stat.parent.name)
        return found

    @property
    def log(self) -> str:
        return (self.serving.data / "worker.log").read_text()


@contextmanager
def serving(home: Path, model: Path, isolation: str, *more: Path) -> Iterator[Started]:
    """A started server on a data folder of its own."""
    home.mkdir(exist_ok=True)
    models = [word for each in (model, *more) for word in ("--model", str(each))]
    started = cli_server.start(home, *models, "--threads", "1", "--isolation", isolation)
    try:
        yield Started(started, Door(started.url, started.secret))
    finally:
        if started.process.poll() is None:
            started.stop(signal.SIGTERM)


@contextmanager
def by_hand(home: Path, sockets: Path, model: Path, worker: Sequence[str]) -> Iterator[tuple[Door, Path]]:
    """Three processes that nobody looks after: a worker by any command, a gate and a front; and what they print."""
    home.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    data, said = home / "data", home / "said"
    w, g = (str(sockets / name / "s") for name in ("w", "g"))
    for path in (w, g):
        Path(path).parent.mkdir(mode=0o700)
    trocar = (sys.executable, "-m", "trocar.cli.app")
    named = ("--model", str(model), "--data", str(data))
    commands = [
        (*worker, *named, "--socket", w, "--network", NETWORK, "--threads", "1"),
        (*trocar, "gate", *named, "--worker", w, "--socket", g, "--network", NETWORK),
        (*trocar, "front", "--gate", g, "--port", str(port)),
    ]
    with said.open("wb") as sink:
        processes = [
            subprocess.Popen(c, env=cli_server.environment(home), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
            for c in commands
        ]  # fmt: skip
    try:
        until(lambda: Path(g).exists() or any(p.poll() is not None for p in processes), COME_UP_S)
        assert [p.poll() for p in processes] == [None] * 3, said.read_text()
        [word] = [w for w in said.read_text().split() if w.startswith("TROCAR_API_KEY=")]
        door = Door(f"http://127.0.0.1:{port}", word.partition("=")[2])
        until(lambda: _answers(door), COME_UP_S)
        yield door, said
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(door: Door) -> bool:
    try:
        return door.send("GET", "/healthz").status_code == 200
    except httpx.TransportError:
        return False
