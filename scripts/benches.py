"""Runs every `bench/NAME.py` alone, one after the other, and keeps its last line: `make bench`.

A benchmark is a module that prints one JSON object as its last line. It goes to `bench/results/NAME.json`, the
only place that documents may quote numbers from; `docs/speed.md` is rewritten from it. Options are passed on, and
names choose: `make bench ARGS="check --quick"`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1800


def run(name: str, args: list[str]) -> bool:
    """Runs one benchmark and stores its result; False when it failed or printed no JSON object."""
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", f"bench.{name}", *args]
    done = subprocess.run(  # noqa: S603 - files of this repository
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
    )
    print(done.stdout, end="", flush=True)
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict):
        print(f"{name}: no result", file=sys.stderr)
        return False
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    (ROOT / "bench" / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return True


def main() -> int:
    # a module beside them that cannot be run is what benchmarks share
    files = sorted((ROOT / "bench").glob("*.py"))
    names = [p.stem for p in files if 'if __name__ == "__main__":' in p.read_text()]
    options = [a for a in sys.argv[1:] if a.startswith("-")]
    chosen = [a for a in sys.argv[1:] if not a.startswith("-")]
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    good = all([run(name, options) for name in chosen or names])
    report = subprocess.run([sys.executable, "-m", "bench.report"], cwd=ROOT, check=False)
    return int(not good or report.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
