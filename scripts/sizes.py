"""Prints how long functions and files are, per package: `make sizes`. Standard library only.

The house aims at a median of 5 to 10 lines per function, 3 % over 50 at most, and no file over 400 lines. A
function's length counts from `def` to its last line, docstring included.
"""

from __future__ import annotations

import ast
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "trocar"
LONG_FUNCTION_LINES = 50
LONG_FILE_LINES = 400
HEAD = f"{'package':<12} {'files':>6} {'lines':>7} {'functions':>10} {'median':>7} {'p90':>5} {'> 50':>7} {'> 400':>6}"


@dataclass
class Room:
    """Line counts of one package."""

    files: list[int] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)

    def row(self, name: str) -> str:
        lengths = sorted(self.functions) or [0]
        p90 = lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))]
        share = sum(n > LONG_FUNCTION_LINES for n in lengths) / len(lengths)
        over = sum(n > LONG_FILE_LINES for n in self.files)
        return (
            f"{name:<12} {len(self.files):>6} {sum(self.files):>7} {len(self.functions):>10} "
            f"{statistics.median(lengths):>7.0f} {p90:>5} {share:>7.1%} {over:>6}"
        )


def measure(root: Path) -> dict[str, Room]:
    """Line counts by top-level package; modules beside the packages count as `(root)`."""
    rooms: dict[str, Room] = defaultdict(Room)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        room = rooms[parts[0] if len(parts) > 1 else "(root)"]
        text = path.read_text()
        room.files.append(len(text.splitlines()))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                room.functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
    return dict(rooms)


def main() -> None:
    rooms = measure(SRC)
    total = Room(
        [n for r in rooms.values() for n in r.files], [n for r in rooms.values() for n in r.functions]
    )
    print(HEAD)
    for name, room in sorted(rooms.items()):
        print(room.row(name))
    print(total.row("all"))


if __name__ == "__main__":
    main()
