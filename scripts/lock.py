"""Writes `server.lock` and `constraints.txt` from `pyproject.toml`: `make lock`.

`server.lock` is what a production server is installed from: one version of every package for all systems and all
Pythons, each with its hashes. `constraints.txt` is what contributors and CI install from: the same versions, and
those of the tools and of the build. Both are resolved from the metadata of the public index, so nothing large is
downloaded and what happens to be installed here does not matter.

Versions that are locked stay; options are passed on to uv and move them: `--upgrade-package NAME`, or `--upgrade`
for all but torch.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK, CONSTRAINTS = ROOT / "server.lock", ROOT / "constraints.txt"
COMPILE = ("pip", "compile", "--no-config", "--quiet", "--universal", "--python-version", "3.11", "--no-header",
           "--no-annotate", "--no-emit-index-url")  # fmt: skip
SERVER = ("--extra", "server", "--extra", "s3", "--extra", "postgres", "--extra", "tokens", "--generate-hashes",
          "--fork-strategy", "fewest")  # fmt: skip
DEV = ("--extra", "dev", "--extra", "tokens")
# What no requirement names: hatchling asks for the first when it builds an editable package; the second writes these.
BESIDE = ("editables>=0.3", "uv>=0.9")

LOCK_HEAD = """\
# What a production server is installed from, by version and hash. Written by `make lock`.
#   pip install --require-hashes --only-binary :all: -r server.lock
#   pip install --no-deps trocar
"""
CONSTRAINTS_HEAD = """\
# The versions this project is tested with, on a CPU-only machine with Python 3.11. Written by `make lock`.
# Elsewhere (a GPU, another Python) you may ignore this file: the ranges in pyproject.toml are what the code needs.
"""


def held(options: list[str]) -> str:
    """The version of torch, when everything else is to move: CI has a CPU build of that one only."""
    everything = {"--upgrade", "-U"} & set(options)
    return (
        "\n".join(re.findall(r"^torch==[\w.]+", CONSTRAINTS.read_text(), re.MULTILINE)) if everything else ""
    )


def resolved(seeds: list[Path], bounds: str, stdin: str, arguments: list[str]) -> str:
    """What uv writes: versions as in `seeds` where nothing speaks against them, and within `bounds`."""
    with tempfile.TemporaryDirectory() as folder:
        output, limits = Path(folder) / "output.txt", Path(folder) / "bounds.txt"
        output.write_text("".join(seed.read_text() for seed in seeds if seed.exists()))
        limits.write_text(bounds)
        command = [sys.executable, "-m", "uv", *COMPILE, "pyproject.toml", "-", *arguments]
        files = ["--constraints", str(limits), "--output-file", str(output)]
        subprocess.run([*command, *files], cwd=ROOT, input=stdin, text=True, check=True)  # noqa: S603 - as typed
        return output.read_text()


def main() -> int:
    if importlib.util.find_spec("uv") is None:
        print("uv is not installed here; `make lock` installs it and runs this.", file=sys.stderr)
        return 2
    options = sys.argv[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = "\n".join([*project["build-system"]["requires"], *BESIDE])
    try:
        lock = resolved([LOCK, CONSTRAINTS], held(options), "", [*SERVER, *options])
        pins = "\n".join(re.findall(r"^[\w.-]+==.*?(?= \\$)", lock, re.MULTILINE))
        constraints = resolved([CONSTRAINTS], pins, build, [*DEV, *options])
    except subprocess.CalledProcessError as e:
        print(f"Nothing was written: uv ended with {e.returncode}.", file=sys.stderr)
        return 1
    LOCK.write_text(LOCK_HEAD + lock)
    CONSTRAINTS.write_text(CONSTRAINTS_HEAD + constraints)
    return 0


if __name__ == "__main__":
    sys.exit(main())
