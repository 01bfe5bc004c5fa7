"""Many users at once, each with a program of their own, against serving them in turn and against no programs.

Every user steers with their own vector at their own layer, at every token; prompts are of many lengths, as
strangers' are; 16 users once more with short ones. Ours is one engine that gets all requests at once. Peers: nnsight
0.8.1, which runs the same requests one after another with the same edits (and must give the same tokens); Hugging
Face `generate` on all prompts in one padded batch without any program; and, where `TROCAR_BENCH_VLLM` names a Python
that has it, vLLM on all prompts without any program. Ratios are the peer's CPU seconds / ours; `generate` and ours
take turns pass by pass, the others and ours turn by turn.

nnsight and vLLM have pins of their own, so each runs in its own Python as a child that measures itself.
`TROCAR_BENCH_NNSIGHT` names the one with nnsight; without it, a virtual environment is made in a temporary
directory, for this run only. A peer that cannot be had is left out and has no ratios.
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
from bench.baton import Baton, Served, Side, race
from bench.machine import finish
from trocar.engine.protocol import Generated, TaskResult
from trocar.models.load import Loaded, load
from trocar.models.pull import locate

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[1]
SHORTEST, SPREAD, TOKENS, STRENGTH = 12, 37, 32, 40.0
SHORT = 20
ROUNDS = {1: 3, 4: 3, 16: 3, 64: 1}
QUICK = {1: 2, 4: 1, 16: 1}
GOALS = {"nnsight_16": 6.0, "generate_16": 1.25}


class Child:
    """A peer's process; one line out and one line back per turn."""

    def __init__(self, python: str, script: str, home: Path) -> None:
        path = ROOT / "bench" / "peers" / script
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        self._child = subprocess.Popen(
            [python, str(path), str(home)],
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


def children(folder: str, home: Path) -> dict[str, Child]:
    """The peers that can be had."""
    found = {}
    wanted = {"nnsight": lambda: python_with_nnsight(folder), "vllm": lambda: os.environ["TROCAR_BENCH_VLLM"]}
    for name, python in wanted.items():
        try:
            found[name] = Child(python(), f"{name}_peer.py", home)
        except (KeyError, OSError, subprocess.SubprocessError, json.JSONDecodeError) as e:
            print(f"{name} is left out: {type(e).__name__}", file=sys.stderr)
    return found


def everyone(loaded: Loaded, count: int, *, short: bool = False) -> list[room.Ask]:
    width, layers = loaded.facts.d_model, loaded.facts.n_layers
    return [
        room.Ask(
            f"user-{i}",
            room.steer(4 + i % (layers - 8), STRENGTH) + room.TEXT,
            [p],
            TOKENS,
            {"v": room.vector(width, i)},
        )
        for i, p in enumerate(room.prompts(count, SHORT) if short else prompts(count))
    ]


def prompts(count: int) -> list[list[int]]:
    """Of 12 to 48 tokens, half long and half short on the way."""
    longest = SHORTEST + SPREAD - 1
    whole = room.prompts(count, longest + 3)
    return [p[: SHORTEST + (18 + 11 * i) % SPREAD] for i, p in enumerate(whole)]


def padded(users: list[room.Ask]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their mask."""
    longest = max(len(u.prompts[0]) for u in users)
    ids = torch.zeros(len(users), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, user in enumerate(users):
        prompt = user.prompts[0]
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


class Plain:
    """Hugging Face `generate` on all prompts at once, without any program."""

    def __init__(self, baton: Baton, home: Path) -> None:
        self._model = room.plain_model(home)
        self._model.generation_config.eos_token_id = None  # no text ends before its length
        self.side = Side(1, baton, self._model.base_model)
        self.tokens: list[list[int]] = []

    def serve(self, users: list[room.Ask]) -> Callable[[], object]:
        ids, mask = padded(users)

        @torch.inference_mode()
        def run() -> None:
            settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
            made = self._model.generate(ids, attention_mask=mask, **settings)
            self.tokens = made[:, ids.shape[1] :].tolist()

        return run


def texts(results: list[TaskResult]) -> list[list[int]]:
    found = [r.outputs["text"] for r in results]
    return [list(t.ids[0]) for t in found if isinstance(t, Generated)]


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
    baton = Baton()
    engine, plain = Served(0, baton, load(MODEL)), Plain(baton, home)
    out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peers = children(folder, home)
        warm = everyone(engine.loaded, 2)
        for verb in (engine.serve(warm), plain.serve(warm)):
            verb()
        for peer in peers.values():
            print(f"peer: {peer.versions}")
            peer.serve(warm)
        for count, rounds in plan.items():
            measure(out, f"{count}", everyone(engine.loaded, count), rounds, engine, plain, peers)
        short = everyone(engine.loaded, 16, short=True)
        measure(out, "16_short", short, plan[16], engine, plain, peers)
        for peer in peers.values():
            peer.close()
    engine.runner.close()
    finish("tenants", out, {k: v for k, v in GOALS.items() if k in out})


def measure(
    out: dict[str, list[float]],
    name: str,
    users: list[room.Ask],
    rounds: int,
    engine: Served,
    plain: Plain,
    peers: dict[str, Child],
) -> None:
    """One number of users: `generate` pass by pass in turns with ours, then the others in turn with ours alone."""
    count = len(users)
    seconds: dict[str, list[float]] = {"ours": [], "generate": [], **{name: [] for name in peers}}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        mine, theirs = race((engine.side, engine.serve(users)), (plain.side, plain.serve(users)))
        out.setdefault(f"generate_{name}", []).append(theirs.seconds / mine.seconds)
        seconds["generate"].append(theirs.seconds)
        alone = engine.side.measure(engine.serve(users))
        seconds["ours"].append(alone.seconds)
        tokens |= {"ours": texts(engine.results), "generate": plain.tokens}
        for who, peer in peers.items():
            spent, tokens[who] = peer.serve(users)
            out.setdefault(f"{who}_{name}", []).append(spent / alone.seconds)
            seconds[who].append(spent)
    speeds = [f"{n} {count * TOKENS / statistics.median(s):.1f}" for n, s in seconds.items() if s]
    print(f"{name:>8} users, tokens per CPU second: {', '.join(speeds)}{agree(tokens)}", flush=True)


if __name__ == "__main__":
    main()
