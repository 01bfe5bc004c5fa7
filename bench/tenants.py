"""Many users at once, each with a program of their own, against serving them in turn and against no programs.

Every user steers with their own vector at their own layer, at every token. Ours is one engine that gets all
requests at once. Peers: nnsight 0.8.1, which serves the same requests one after another with the same edits
(and must give the same tokens), and Hugging Face `generate` on all prompts in one padded batch without any
program, the speed that serving different programs cannot be expected to reach. Ratios are the peer's CPU
seconds / ours.

nnsight has its own pins, so it runs in a Python of its own as a child that measures itself:
`TROCAR_BENCH_NNSIGHT` names that Python. Without it, a virtual environment is made in a temporary directory,
for this run only. When that fails, the peer is left out and has no ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import room
from bench.machine import finish
from trocar.engine.hf.engine import HFEngine
from trocar.engine.protocol import Generated
from trocar.models.load import Loaded, load
from trocar.models.pull import locate

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[1]
LENGTH, TOKENS, STRENGTH = 20, 32, 40.0
ROUNDS = {1: 3, 4: 3, 16: 3, 64: 1}
QUICK = {1: 2, 4: 1, 16: 1}
Side = Callable[[list[room.Ask]], tuple[float, list[list[int]]]]
GOALS = {"nnsight_16": 6.0, "generate_16": 1.25}


class Nnsight:
    """The child process; one line out and one line back per turn."""

    def __init__(self, python: str, home: Path) -> None:
        script = ROOT / "bench" / "peers" / "nnsight_peer.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        self._child = subprocess.Popen(
            [python, str(script), str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.versions = self._line()

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        found: dict[str, Any] = json.loads(self._child.stdout.readline())
        return found

    def serve(self, users: list[room.Ask]) -> tuple[float, list[list[int]]]:
        """CPU seconds of the child, and the tokens."""
        requests = [
            {"prompt": u.prompts[0], "layer": layer_of(u), "vector": (STRENGTH * u.vectors["v"]).tolist()}
            for u in users
        ]
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"requests": requests, "new_tokens": users[0].new_tokens}) + "\n")
        self._child.stdin.flush()
        answer = self._line()
        return answer["cpu_s"], answer["tokens"]

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def layer_of(user: room.Ask) -> int:
    return int(str(user.nodes[1]["site"]).partition(".")[2])


def python_with_nnsight(folder: str) -> str:
    """The named one, or a new virtual environment in `folder`."""
    named = os.environ.get("TROCAR_BENCH_NNSIGHT")
    if named:
        return named
    print("making a virtual environment for nnsight; TROCAR_BENCH_NNSIGHT=PYTHON names one that is there")
    venv.create(folder, with_pip=True)
    python = str(Path(folder) / "bin" / "python")
    wanted = ["nnsight==0.8.1", "transformers", "-c", str(ROOT / "constraints.txt")]
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return python


def child(folder: str, home: Path) -> Nnsight | None:
    try:
        return Nnsight(python_with_nnsight(folder), home)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as e:
        print(f"nnsight is left out: {type(e).__name__}", file=sys.stderr)
        return None


def everyone(loaded: Loaded, count: int) -> list[room.Ask]:
    width, layers = loaded.facts.d_model, loaded.facts.n_layers
    return [
        room.Ask(
            f"user-{i}",
            room.steer(4 + i % (layers - 8), STRENGTH) + room.TEXT,
            [p],
            TOKENS,
            {"v": room.vector(width, i)},
        )
        for i, p in enumerate(room.prompts(count, LENGTH))
    ]


def ours(runner: HFEngine, loaded: Loaded, users: list[room.Ask]) -> tuple[float, list[list[int]]]:
    """CPU seconds from accepted programs to results, checking included, and the tokens."""
    results: list[Any] = []
    seconds = room.cpu(lambda: results.extend(room.together(runner, [u.task(loaded) for u in users])))
    texts = [r.outputs["text"] for r in results]
    return seconds, [list(t.ids[0]) for t in texts if isinstance(t, Generated)]


def generate(model: Any, users: list[room.Ask]) -> tuple[float, list[list[int]]]:
    """CPU seconds of one left-padded batch without programs, and the tokens."""
    longest = max(len(u.prompts[0]) for u in users)
    ids = torch.zeros(len(users), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, user in enumerate(users):
        prompt = user.prompts[0]
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    made: list[Any] = []
    with torch.inference_mode():
        seconds = room.cpu(lambda: made.append(model.generate(ids, attention_mask=mask, **settings)))
    return seconds, made[0][:, longest:].tolist()


def agree(tokens: dict[str, list[list[int]]]) -> str:
    """Whose tokens are alike. Nearly all of ours and nnsight's must be, and nearly all must differ from plain text,
    or somebody did not do what was asked."""
    mine = tokens["ours"]
    moved = sum(a != b for a, b in zip(mine, tokens["generate"], strict=True))
    said = f"; {moved} steered away from the plain text"
    same = len(mine)
    if "nnsight" in tokens:
        same = sum(a == b for a, b in zip(mine, tokens["nnsight"], strict=True))
        said += f", {same} the same as nnsight"
    if min(same, moved) * 4 < len(mine) * 3 or any(len(t) != TOKENS for ts in tokens.values() for t in ts):
        raise SystemExit(f"the sides did not do the same work: {len(mine)} users{said}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    plan = QUICK if parser.parse_args().quick else ROUNDS
    torch.set_num_threads(1)
    home, _ = locate(MODEL)
    loaded, model = load(MODEL), room.plain_model(home)
    model.generation_config.eos_token_id = None  # no text ends before its length
    runner = room.engine(loaded)
    out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peer = child(folder, home)
        sides: dict[str, Side] = {
            "ours": lambda users: ours(runner, loaded, users),
            "generate": lambda users: generate(model, users),
        }
        if peer:
            sides["nnsight"] = peer.serve
            print(f"peer: {peer.versions}")
        for side in sides.values():
            side(everyone(loaded, 2))
        for count, rounds in plan.items():
            measure(out, everyone(loaded, count), rounds, sides)
        if peer:
            peer.close()
    runner.close()
    finish("tenants", out, GOALS if peer else {"generate_16": GOALS["generate_16"]})


def measure(out: dict[str, list[float]], users: list[room.Ask], rounds: int, sides: dict[str, Side]) -> None:
    """One number of users: alternating turns, a line of the table, ratios into `out`."""
    tokens: dict[str, list[list[int]]] = {}

    def turn(name: str) -> Callable[[], float]:
        def run() -> float:
            seconds, tokens[name] = sides[name](users)
            return seconds

        return run

    found = room.turns({name: turn(name) for name in sides}, rounds)
    count = len(users)
    for name in sides:
        if name != "ours":
            out[f"{name}_{count}"] = room.ratios(found[name], found["ours"])
    speeds = [f"{n} {count * TOKENS / statistics.median(s):.1f}" for n, s in found.items()]
    print(f"{count:>3} users, tokens per CPU second: {', '.join(speeds)}{agree(tokens)}", flush=True)


if __name__ == "__main__":
    main()
