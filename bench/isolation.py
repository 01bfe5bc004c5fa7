"""What three processes cost: the same request over HTTP to a server in one process and to one in three, in turns.

The peer is our own server with `--isolation process` on the same model. One client sends one request after another
over one connection and waits for each, so what is measured is the way there and back: a check on both sides, two more
hops of frames. A ratio is seconds in one process / seconds in three; 1.0 means free.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.machine import finish

MODEL = "smollm2-135m-instruct"
GOALS = {"tokens_1": 0.9, "tokens_64": 0.97}
START_S = 300.0


@dataclass(frozen=True)
class Server:
    """One started server and a connection to it."""

    name: str
    http: httpx.Client

    def generate(self, model: str, prompt: str, tokens: int) -> float:
        """Seconds from sending a request to holding its whole answer."""
        program = {"nodes": [{"op": "text", "id": "text"}]}
        generation = {"max_new_tokens": tokens, "stop_at_eos": False}
        body = {"model": model, "prompts": [prompt], "program": program, "generation": generation}
        started_s = time.perf_counter()
        job = self.http.post("/v1/runs", json=body).json()["job"]
        heard = self.http.get(f"/v1/jobs/{job}/result", params={"wait_s": "30"})
        took_s = time.perf_counter() - started_s
        if heard.status_code != 200:
            raise RuntimeError(heard.text)
        return took_s


@contextmanager
def served(isolation: str, folder: Path, model: str) -> Iterator[Server]:
    """A server on a free port and a data folder of its own."""
    ready, said = folder / "ready.json", folder / "said"
    words = ("serve", "--model", model, "--port", "0", "--data", str(folder / "data"), "--threads", "1")
    command = [sys.executable, "-m", "trocar.cli.app", *words]
    options = ["--ready-file", str(ready), "--isolation", isolation]
    with said.open("wb") as sink:
        process = subprocess.Popen([*command, *options], stdout=sink, stderr=sink, env=dict(os.environ))
    try:
        deadline_s = time.monotonic() + START_S
        while not ready.is_file():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(said.read_text())
            time.sleep(0.1)
        [word] = [w for w in said.read_text().split() if w.startswith("TROCAR_API_KEY=")]
        headers = {"authorization": f"Bearer {word.partition('=')[2]}"}
        with httpx.Client(base_url=json.loads(ready.read_text())["url"], headers=headers, timeout=60) as http:
            yield Server(isolation, http)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def turns(one: Server, three: Server, model: str, tokens: int, n: int) -> dict[str, list[float]]:
    """Seconds of each server, in alternating turns, each beginning every other time."""
    found: dict[str, list[float]] = {one.name: [], three.name: []}
    for i in range(n):
        for server in (one, three) if i % 2 else (three, one):
            # a new prompt each time: nothing comes from the prefix cache
            found[server.name].append(server.generate(model, f"{i}: the capital of France is", tokens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default=MODEL, help="a catalog name or a directory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    asks = {"tokens_1": (1, 10 if given.quick else 60), "tokens_64": (64, 3 if given.quick else 20)}
    ratios: dict[str, list[float]] = {}
    middle_ms: dict[str, Any] = {}
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        one = stack.enter_context(served("process", folders[0], given.model))
        three = stack.enter_context(served("host", folders[1], given.model))
        name = one.http.get("/v1/models").json()["models"][0]["name"]
        turns(one, three, name, 2, 3)
        for what, (tokens, n) in asks.items():
            found = turns(one, three, name, tokens, n)
            parts = 5 if n >= 20 else 1
            ratios[what] = [
                statistics.median(found["process"][k::parts]) / statistics.median(found["host"][k::parts])
                for k in range(parts)
            ]
            for side, times in found.items():
                middle_ms[f"{what}_{side}"] = 1000 * statistics.median(times)
                print(f"{what} {side}: {middle_ms[f'{what}_{side}']:.1f} ms median of {n}")
    finish("isolation", ratios, GOALS, median_ms=middle_ms)


if __name__ == "__main__":
    main()
