"""What machine a result was measured on, and the line every benchmark ends with."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path


def describe() -> str:
    """CPU model, cores, Python and torch, in one line."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    threads = torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {versions}, {threads} threads"


def finish(
    bench: str,
    ratios: dict[str, list[float]],
    goals: dict[str, float],
    **measured: dict[str, float],
) -> None:
    """Prints the last line: medians of the ratios, their spread over the turns, and what else was measured.

    A goal is the least that its ratio should be. Names in `measured` tell the unit.
    """
    middle = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    spread = {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()}
    more = {name: {k: float(f"{v:.4g}") for k, v in values.items()} for name, values in measured.items()}
    result = {"bench": bench, "machine": describe(), "ratios": middle, "spread": spread, "goals": goals}
    print(json.dumps({**result, **more}))
