"""A real `trocar serve` process on a free port, with a data folder that outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import trocar

START_S = 120.0
MODEL = "smollm2-135m-instruct"


def environment(home: Path) -> dict[str, str]:
    """No settings of the real user except the model cache."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TROCAR_") or k == "TROCAR_CACHE"}
    source = str(Path(trocar.__file__).parents[1])
    return {**clean, "PYTHONPATH": source, "XDG_CONFIG_HOME": str(home / "config"), "OMP_NUM_THREADS": "1"}


def command(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs another `trocar` verb to its end."""
    return subprocess.run(
        [sys.executable, "-m", "trocar.cli.app", *words],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def script(home: Path, code: str, url: str, secret: str) -> subprocess.Popen[str]:
    """Starts a user's script in a Python of its own, with the address and key in its environment."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**environment(home), "TROCAR_URL": url, "TROCAR_API_KEY": secret},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass
class Serving:
    """One started process; `data` is its data folder."""

    home: Path
    process: subprocess.Popen[bytes]
    url: str = ""
    secret: str = ""
    out: Path = field(default=Path())

    @property
    def data(self) -> Path:
        return self.home / "data"

    def said(self) -> str:
        return self.out.read_text()

    def run(self, code: str, secret: str | None = None) -> str:
        """What a user's script prints, which must succeed."""
        with script(self.home, code, self.url, secret or self.secret) as user:
            out, err = user.communicate(timeout=120)
        assert user.returncode == 0, err
        return out

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code and seconds."""
        started_s = time.monotonic()
        self.process.send_signal(how)
        return self.process.wait(30), time.monotonic() - started_s


def start(home: Path, *words: str) -> Serving:
    """Starts a server and waits until it says that it is ready."""
    ready, out = home / "ready.json", home / f"out-{time.monotonic_ns()}"
    arguments = ["serve", "--port", "0", "--data", str(home / "data"), "--ready-file", str(ready), *words]
    with out.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "trocar.cli.app", *arguments],
            env=environment(home),
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    serving = Serving(home, process, out=out)
    deadline_s = time.monotonic() + START_S
    while not (ready.is_file() and json.loads(ready.read_text())["pid"] == process.pid):
        if process.poll() is not None or time.monotonic() > deadline_s:
            process.kill()
            raise AssertionError(serving.said())
        time.sleep(0.05)
    serving.url = json.loads(ready.read_text())["url"]
    found = [word for word in serving.said().split() if word.startswith("TROCAR_API_KEY=")]
    serving.secret = found[0].partition("=")[2] if found else ""
    return serving
