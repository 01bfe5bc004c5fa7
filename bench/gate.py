"""What the ledger costs: pairs of reserve and settle on both kinds of database, and its part of a whole request.

The peer of the ledger is its own database: two commits that change one row each, on the same disk, in alternating
turns; a pair of ours is two commits as well, and `*_over_raw` is raw time / ours. `*_50_over_1` is the pairs per
second of fifty threads / those of one: at 1.0 a crowd loses nothing. All of it in wall time, because what a commit
costs is waiting for the disk.

`request_*` is a generation of 64 tokens by SmolLM2: time without the gate / time with it. With it the caller is named
by the secret, the worst case is held before the run and the answer is charged after it, both on disk. Without it is
the run inside that same request, so that both meet the same moment of a busy machine.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from scripts.postgres_server import running

from bench import room
from bench.machine import finish
from trocar.engine.hf.engine import HFEngine, Limits
from trocar.gate.database import Database
from trocar.gate.keys import Keys
from trocar.gate.ledger import Ledger, Reservation
from trocar.gate.limits import Limits as Budget
from trocar.gate.limits import Payer
from trocar.gate.policy import Lineage, Role, Tier
from trocar.models.load import load
from trocar.models.pull import locate

THREADS, TOKENS, LENGTH, BITS = 50, 64, 24, 2_000
MODEL = "smollm2-135m-instruct"
LINEAGE = Lineage("bench", 10**15, Tier.trusted)
WIDE = Budget(10**14, 10**13)
GOALS = {"request_sqlite": 0.95, "request_postgres": 0.95, "sqlite_50_over_1": 0.8, "postgres_50_over_1": 0.8}


@dataclass
class Side:
    """One kind of database: a ledger with a key, and the same commits without a ledger."""

    name: str
    ledger: Ledger
    keys: Keys
    secret: str
    raw_pair: Callable[[], None]

    def hold(self) -> Reservation:
        """Names the caller and holds the worst case, as the gate does before a run."""
        who = self.keys.authenticate(self.secret)
        payers = (Payer(f"key:{who.key_id}", WIDE), Payer("project:bench", WIDE))
        held = self.ledger.reserve(
            who, LINEAGE, BITS, payers=payers, limits=WIDE, request_digest="0" * 64, request_id="req_bench"
        )
        if not isinstance(held, Reservation):
            raise TypeError(held)
        return held

    def pair(self) -> None:
        self.ledger.settle(self.hold(), BITS // 2, b"x" * 500)


@contextmanager
def sides(folder: Path) -> Iterator[list[Side]]:
    """A file of SQLite, and a new PostgreSQL server on the same disk."""
    with ExitStack() as stack:
        server = stack.enter_context(running())
        plain = sqlite3.connect(folder / "raw.db", isolation_level=None)
        stack.callback(plain.close)
        for line in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL"):
            plain.execute(line)
        schema = server.new_schema()
        client = stack.enter_context(server.connect(schema))
        urls = {"sqlite": f"sqlite:///{folder / 'ledger.db'}", "postgres": server.url(schema)}
        raw: dict[str, Callable[[str], object]] = {"sqlite": plain.execute, "postgres": client.execute}
        made = []
        for name, url in urls.items():
            database = Database(url)
            stack.callback(database.close)
            ledger = Ledger(database, anchors=folder / f"anchors-{name}")
            stack.callback(ledger.close)
            keys = Keys(database)
            secret = keys.create("bench", Tier.external, Role.researcher).secret
            made.append(Side(name, ledger, keys, secret, _raw_pair(raw[name])))
        yield made


def _raw_pair(execute: Callable[[str], object]) -> Callable[[], None]:
    execute("CREATE TABLE raw (n BIGINT)")
    execute("INSERT INTO raw VALUES (0)")

    def pair() -> None:
        for _ in range(2):
            for line in ("BEGIN", "UPDATE raw SET n = n + 1", "COMMIT"):
                execute(line)

    return pair


def wall(verb: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    verb()
    return time.perf_counter() - started_s


def crowd(side: Side, each: int) -> tuple[float, list[float]]:
    """Seconds of fifty threads with `each` pairs, and the seconds of every pair."""
    times: list[float] = []
    begin = threading.Barrier(THREADS + 1)

    def work() -> None:
        begin.wait()
        times.extend(wall(side.pair) for _ in range(each))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    begin.wait()
    return wall(lambda: [thread.join() for thread in threads]), times


def requests(made: list[Side], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of a request without the gate / with it, side by side."""
    loaded = load(locate(MODEL)[0], name=MODEL)
    engine = HFEngine(loaded, Limits(gather_s=0.0, prefix_cache=False))
    room.spare_collector()
    prompts = room.prompts(rounds + 1, LENGTH)
    out: dict[str, list[float]] = {f"request_{side.name}": [] for side in made}
    try:
        for number, prompt in enumerate(prompts):
            for side in made:
                started_s = time.perf_counter()
                held = side.hold()
                task = room.Ask("bench", room.TEXT, [prompt], tokens).task(loaded)
                running_s = wall(lambda task=task: engine.submit(task).result())  # type: ignore[misc]
                payload = json.dumps({"tokens": list(range(tokens))}).encode()
                side.ledger.settle(held, BITS // 2, payload)
                if number:  # the first round warms up
                    out[f"request_{side.name}"].append(running_s / (time.perf_counter() - started_s))
    finally:
        engine.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rounds, pairs, each, generations, tokens = (2, 20, 2, 1, 16) if quick else (10, 100, 10, 12, TOKENS)
    torch.set_num_threads(1)
    ratios: dict[str, list[float]] = {}
    per_s, median_ms, p99_ms = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, sides(Path(folder)) as made:
        for side in made:
            side.pair()
            over, against, alone = [], [], []
            for _ in range(rounds):
                raw_s = [wall(side.raw_pair) for _ in range(pairs // rounds)]
                own_s = [wall(side.pair) for _ in range(pairs // rounds)]
                over.append(statistics.median(raw_s) / statistics.median(own_s))
                whole_s, times = crowd(side, max(1, each // rounds))
                against.append(len(times) / whole_s * statistics.mean(own_s))
                alone.extend(own_s)
                median_ms.setdefault(f"{side.name}_50", []).extend(1000 * t for t in times)
                per_s.setdefault(f"{side.name}_50", []).append(len(times) / whole_s)
            ratios[f"{side.name}_over_raw"], ratios[f"{side.name}_50_over_1"] = over, against
            median_ms[f"{side.name}_1"] = [1000 * t for t in alone]
            per_s[f"{side.name}_1"] = [1 / statistics.mean(alone)]
        ratios.update(requests(made, generations, tokens))
    p99_ms = {name: sorted(times)[int(0.99 * len(times))] for name, times in median_ms.items()}
    middle_ms = {name: statistics.median(times) for name, times in median_ms.items()}
    rates = {name: statistics.median(found) for name, found in per_s.items()}
    for name in sorted(rates):
        print(
            f"{name:<14}{rates[name]:8.1f} pairs/s {middle_ms[name]:9.2f} ms median {p99_ms[name]:9.2f} ms p99"
        )
    finish("gate", ratios, GOALS, pairs_per_s=rates, median_ms=middle_ms, p99_ms=p99_ms)


if __name__ == "__main__":
    main()
