"""Writes the measured parts of `docs/speed.md` from `bench/results/`: `python -m bench.report`.

With `--check` it writes nothing and fails when the page is not current.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "bench" / "results"
_PART = re.compile(r"(<!-- measured: ([a-z]+) -->\n)(.*?)(<!-- /measured -->)", re.DOTALL)
OVERHEAD = {
    "edit": "one edit, own layer and own vector",
    "capture_one_layer": "one layer captured at `all`",
    "capture_all_layers": "30 layers captured at `all`",
    "capture_one_layer_same_passes": "one layer captured, as many passes",
    "capture_all_layers_same_passes": "30 layers captured, as many passes",
}
SCALE = {
    "layers_1_over_30": "1 captured layer / 30 captured layers",
    "vectors_1_over_64": "1 vector / 64 vectors, at one layer",
    "no_program_over_layers_1": "no program / 1 captured layer",
    "no_program_over_layers_30": "no program / 30 captured layers",
    "no_program_over_vectors_64": "no program / 64 vectors at one layer",
    "no_program_over_own_layer": "no program / 64 vectors at 30 layers",
}
DATABASES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(*rows: tuple[str, ...]) -> str:
    head, *body = ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def ratio(bench: dict[str, Any], name: str) -> tuple[str, str, str]:
    """Median, spread and goal."""
    low, high = bench["spread"][name]
    goal = bench["goals"].get(name)
    return (
        f"{bench['ratios'][name]:.2f}",
        f"{low:.2f} to {high:.2f}",
        "" if goal is None else f">= {goal:g}",
    )


def measured_on(bench: dict[str, Any]) -> str:
    return f"\nMeasured on: {bench['machine']}.\n"


def overhead() -> str:
    bench = result("overhead")
    rows = [(text, *ratio(bench, name)) for name, text in OVERHEAD.items()]
    return table(("requests with", "speed, no program = 1", "over all turns", "goal"), *rows) + measured_on(
        bench
    )


def tenants() -> str:
    bench = result("tenants")
    peers = {
        "nnsight": "nnsight, one after another",
        "generate": "`generate`, one batch, no programs",
        "vllm": "vLLM, one batch, no programs",
    }
    rows = [
        (name.partition("_")[2].replace("_", ", "), peers[name.partition("_")[0]], *ratio(bench, name))
        for name in bench["ratios"]
    ]
    rows.sort(key=lambda row: (row[1], int(row[0].partition(",")[0]), row[0]))
    return table(("users", "peer", "ours, peer = 1", "over all turns", "goal"), *rows) + measured_on(bench)


def check() -> str:
    bench = result("check")
    rows = []
    for name in bench["median_ms"]:
        size, _, prompts = name.partition("_")
        times = (f"{bench[k][name]:.2f}" for k in ("median_ms", "p99_ms", "pydantic_ms"))
        rows.append((f"{bench['nodes'][size]:.0f}", prompts, *times))
    head = ("nodes", "prompts", "median, ms", "99th percentile, ms", "pydantic alone, ms")
    ratios = bench["ratios"]
    linear = (
        f"\nTime per node at {bench['nodes']['n500']:.0f} nodes / at {bench['nodes']['largest']:.0f}: "
        f"{ratios['linear_1']:.2f} with one prompt, {ratios['linear_64']:.2f} with 64.\n"
    )
    return table(head, *rows) + linear + measured_on(bench)


def scale() -> str:
    bench = result("scale")
    rows = [(text, *ratio(bench, name)) for name, text in SCALE.items()]
    terms = bench["capture_us"]
    fitted = (
        f"\nOn the narrow model a pass takes {terms['step']:.0f} + {terms['user']:.0f} U + {terms['layer']:.0f} L + "
        f"{terms['user_layer']:.1f} U L microseconds for U users who capture L layers each (within "
        f"{terms['worst']:.0%} of every cell).\n"
    )
    return (
        table(("64 users, time of", "ratio", "over all turns", "goal"), *rows) + fitted + measured_on(bench)
    )


def ledger() -> str:
    """Pairs of reserve and settle by one thread and by fifty, compared with each other and with bare commits."""
    bench = result("gate")
    rows = [
        (words, str(n), *(f"{bench[k][f'{name}_{n}']:.1f}" for k in ("pairs_per_s", "median_ms", "p99_ms")))
        for name, words in DATABASES.items()
        for n in (1, 50)
    ]
    compared = {"50_over_1": "pairs/s, 50 threads / 1", "over_raw": "time, two bare commits / a pair"}
    ratios = [
        (words, text, *ratio(bench, f"{name}_{end}"))
        for end, text in compared.items()
        for name, words in DATABASES.items()
    ]
    return (
        table(("ledger in", "threads", "pairs/s", "median, ms", "99th percentile, ms"), *rows)
        + "\n"
        + table(("ledger in", "compared", "ratio", "over all turns", "goal"), *ratios)
        + measured_on(bench)
    )


def gate() -> str:
    """What of a request is the gate: one less the ratio of the run alone to the whole."""
    bench = result("gate")
    rows = []
    for name, words in DATABASES.items():
        of = f"request_{name}"
        low, high = bench["spread"][of]
        part, least, most = (f"{1 - x:.1%}" for x in (bench["ratios"][of], high, low))
        rows.append((words, part, f"{least} to {most}", f"<= {1 - bench['goals'][of]:.0%}"))
    return table(("ledger in", "the gate's part", "over all turns", "goal"), *rows) + measured_on(bench)


def isolation() -> str:
    bench = result("isolation")
    rows = []
    for name in bench["ratios"]:
        tokens = name.removeprefix("tokens_")
        times = (f"{bench['median_ms'][f'{name}_{side}']:.0f}" for side in ("process", "host"))
        rows.append((tokens, *times, *ratio(bench, name)))
    head = ("new tokens", "one process, ms", "three, ms", "one / three", "over all turns", "goal")
    return table(head, *rows) + measured_on(bench)


PARTS = {
    "overhead": overhead,
    "tenants": tenants,
    "check": check,
    "scale": scale,
    "ledger": ledger,
    "gate": gate,
    "isolation": isolation,
}


def filled(page: str) -> str:
    """The page with its measured parts as the results say."""
    return _PART.sub(lambda m: m[1] + PARTS[m[2]]() + m[4], page)


def main() -> int:
    page = PAGE.read_text()
    new = filled(page)
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
