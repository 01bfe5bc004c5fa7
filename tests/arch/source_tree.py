"""What the architecture tests look at: the files of the repository and their syntax trees."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "trocar"
NOT_OURS = {".git", ".venv", ".hypothesis", "site", "dist", "__pycache__", "report.html", ".coverage"}


def modules(room: str = "") -> list[Path]:
    """Every Python file of the package, or of one room of it."""
    return sorted((SRC / room).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    """`gate/release.py`: the path inside the package."""
    return path.relative_to(SRC).as_posix()


def tracked() -> list[Path]:
    """Files under version control and files that would be; in an unpacked copy, every file that is ours."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        found = [p for p in ROOT.rglob("*") if not any(map(_not_ours, p.relative_to(ROOT).parts))]
    return sorted(p for p in found if p.is_file())


def _not_ours(part: str) -> bool:
    return part in NOT_OURS or part.endswith(("_cache", ".egg-info"))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def called(call: ast.Call) -> str:
    """The dotted name that a call calls: `torch.load`; the last part alone for anything computed."""
    return dotted(call.func)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else node.attr
    return ""
