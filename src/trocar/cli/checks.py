"""What `trocar doctor` looks at, one function per thing. A check reports; it repairs nothing by itself."""

from __future__ import annotations

import os
import platform
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from trocar import __version__, errors
from trocar.cli import ledger, show
from trocar.cli.folder import Folder
from trocar.cli.model import cached_models
from trocar.cli.serve import DEFAULT_MODEL

PACKAGES: Final = (
    "torch", "transformers", "safetensors", "numpy", "pydantic", "httpx", "fastapi", "uvicorn", "sqlalchemy",
    "pyarrow", "scikit-learn", "platformdirs", "typer", "rich",
)  # fmt: skip
LITTLE_BYTES: Final = 10_000_000_000
TOO_LITTLE_BYTES: Final = 1_000_000_000
ANSWER_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `next_step` is empty when there is nothing to do."""

    check: str
    level: Literal["ok", "warn", "fail"]
    said: str
    next_step: str = ""


def everything(folder: Folder) -> Iterator[Finding]:
    """All checks, cheap ones first."""
    yield python()
    missing = packages()
    yield missing
    if missing.level != "fail":
        yield torch_cpu()
    yield from cache()
    yield data(folder)
    yield from ledger_of(folder)
    yield from store_of(folder)
    yield from server()


def python() -> Finding:
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("python", "ok", f"trocar {__version__} on {where}")


def packages() -> Finding:
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        return Finding(
            "packages", "fail", f"not installed: {', '.join(absent)}", "Run `pip install 'trocar[server]'`."
        )
    return Finding("packages", "ok", ", ".join(found))


def torch_cpu() -> Finding:
    import torch

    capability, threads, cores = (
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        os.cpu_count() or 1,
    )
    said = f"{threads} threads on {cores} cores, {capability}, torch {torch.__version__}"
    if capability == "DEFAULT":
        return Finding(
            "torch", "warn", said, "This CPU or build has no vector instructions (AVX): expect it slow."
        )
    if threads > cores:
        return Finding("torch", "warn", said, f"Start with `trocar serve --threads {cores}`.")
    return Finding("torch", "ok", said)


def cache() -> Iterator[Finding]:
    for row in cached_models():
        if row.state == "cached":
            yield Finding("cache", "ok", f"{row.name} is whole ({show.size(row.size_bytes)}) in {row.path}")
        elif row.state == "damaged":
            step = f"Delete {row.path}, then run `trocar model pull {row.name}`."
            yield Finding("cache", "fail", f"{row.name}: the files are not those that were pulled", step)
        elif row.name == DEFAULT_MODEL:
            step = f"Run `trocar model pull {row.name}`, or serve another model."
            yield Finding("cache", "warn", f"{row.name}, the default model, is not pulled", step)


def data(folder: Folder) -> Finding:
    if not folder.root.exists():
        return Finding("data", "warn", f"{folder.root} does not exist", "`trocar serve` makes it.")
    if not os.access(folder.root, os.W_OK | os.X_OK):
        return Finding("data", "fail", f"{folder.root} cannot be written", "Choose another with --data.")
    free_bytes = shutil.disk_usage(folder.root).free
    said = f"{folder.root} is writable, {show.size(free_bytes)} free"
    if free_bytes < TOO_LITTLE_BYTES:
        return Finding("data", "fail", said, "Free some space: the ledger stops when the disk is full.")
    if free_bytes < LITTLE_BYTES:
        return Finding("data", "warn", said, "Captured activations may fill it: free some space.")
    return Finding("data", "ok", said)


def ledger_of(folder: Folder) -> Iterator[Finding]:
    if not folder.has_ledger:
        yield Finding("ledger", "ok", "there is none yet")
        return
    if folder.ledger.is_file() and _others_may_read(folder.ledger):
        yield Finding("ledger", "warn", f"others may read {folder.ledger}", f"chmod 600 {folder.ledger}")
    try:
        with ledger.reading(folder) as connection:
            found = ledger.problems(connection)
    except errors.TrocarError as e:
        yield Finding(
            "ledger", "fail", e.reason, "Restore the file from a backup; nothing is released meanwhile."
        )
        return
    for problem in found:
        yield Finding("ledger", "fail", problem, "Keep a copy of the file as it is, then restore a backup.")
    if not found:
        yield Finding("ledger", "ok", "the log is whole and all accounts agree with it")


def store_of(folder: Folder) -> Iterator[Finding]:
    if not (folder.store / "catalog.sqlite").is_file():
        yield Finding("store", "ok", "there is none yet")
        return
    from trocar.service.compose import store_problems

    found = store_problems(folder.store)
    for problem in found:
        yield Finding("store", "fail", problem, "Delete the handle that the path names, or restore a backup.")
    if not found:
        yield Finding("store", "ok", "every file is there with its size, and nothing else")


def server() -> Iterator[Finding]:
    from trocar.client.settings import Settings, config_path

    if os.path.isfile(config_path()) and _others_may_read(config_path()):
        yield Finding("server", "warn", f"others may read {config_path()}", f"chmod 600 {config_path()}")
    try:
        settings = Settings.find()
    except errors.TrocarError as e:
        yield Finding("server", "fail", e.reason, f"Correct or delete {config_path()}.")
        return
    yield _answer(settings)


def _answer(settings: Any) -> Finding:
    import httpx

    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    try:
        with httpx.Client(base_url=settings.url, timeout=ANSWER_S, headers=headers) as http:
            health, account = http.get("/healthz"), http.get("/v1/ledger")
    except (httpx.TransportError, httpx.InvalidURL) as e:
        said = f"nothing answers at {settings.url} ({type(e).__name__})"
        return Finding("server", "warn", said, "Start it with `trocar serve`, or set TROCAR_URL.")
    if health.status_code != 200 or "x-request-id" not in health.headers:
        said = f"{settings.url} answers, but not as a Trocar server (HTTP {health.status_code})"
        return Finding("server", "fail", said, "Set TROCAR_URL, or correct the config file.")
    if account.status_code == 401:
        state = "not accepted" if settings.api_key else "missing"
        said = f"{settings.url} answers; the configured key is {state}"
        return Finding("server", "warn", said, "Set TROCAR_API_KEY; `trocar key create` makes a key.")
    return Finding("server", "ok", f"{settings.url} answers and accepts the configured key")


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
