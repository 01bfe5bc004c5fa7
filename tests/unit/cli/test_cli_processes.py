"""Three processes and who looks after them: heard, started again with patience, given up, stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trocar.cli import child, processes
from trocar.cli.inherited import environment
from trocar.cli.processes import Household, Process
from trocar.errors import TrocarError

SCRIPT = """
import os, signal, sys, time
name, how, fd = sys.argv[1], sys.argv[2], int(sys.argv[-1])
if how == "dies":
    sys.exit(3)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
os.write(fd, b"-" if how == "open" else b"+")
print("up", name, flush=True)
while not stopped and os.getppid() != 1:
    time.sleep(0.02)
if how == "stuck":
    time.sleep(60)
print("down", name, time.monotonic(), flush=True)
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Household]]:
    """A household of small scripts, each of which does as it is told."""
    script = tmp_path / "part.py"
    script.write_text(SCRIPT)
    plain = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return plain([command[0], str(script), *command[3:]], **options)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    made = list[Household]()

    def household(**hows: str) -> Household:
        all_ = {"worker": "fine", "gate": "fine", "front": "fine", **hows}
        named = {n: Process(n, (n, how), output=tmp_path / f"{n}.log") for n, how in all_.items()}
        made.append(Household(**named))
        return made[-1]

    yield household
    for each in made:
        each.stop()


def test_they_come_up_and_stop_gate_first(parts: Callable[..., Household], tmp_path: Path) -> None:
    home = parts()
    assert home.start() is True
    home.stop()
    assert [p.child.returncode for p in home.all if p.child] == [0, 0, 0]
    downs = {n: float((tmp_path / f"{n}.log").read_text().split()[-1]) for n in ("worker", "gate", "front")}
    assert downs["worker"] > max(downs["gate"], downs["front"])


def test_a_worker_that_keeps_the_network_says_so(parts: Callable[..., Household]) -> None:
    assert parts(worker="open").start() is False


@pytest.mark.parametrize("name", ["worker", "gate", "front"])
def test_one_that_does_not_come_up_ends_the_start(parts: Callable[..., Household], name: str) -> None:
    with pytest.raises(TrocarError) as caught:
        parts(**{name: "dies"}).start()
    assert (caught.value.code, caught.value.path) == ("start_failed", name)
    assert "exit code 3" in caught.value.reason
    assert f"{name}.log" in caught.value.reason


def looked_after(home: Household, until: Callable[[], bool]) -> None:
    """Looks after them until something is so."""

    def sleep(_: float) -> None:
        if until():
            raise KeyboardInterrupt
        time.sleep(0.02)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "time", type("Clock", (), {"sleep": sleep, "monotonic": time.monotonic}))
        with pytest.raises(KeyboardInterrupt):
            home.look_after()


def test_one_that_dies_is_started_again(parts: Callable[..., Household]) -> None:
    home = parts()
    home.start()
    assert home.worker.child is not None
    first = home.worker.child.pid
    os.kill(first, signal.SIGKILL)
    looked_after(home, lambda: home.worker.child.pid != first and home.worker.came_up)  # type: ignore[union-attr]
    assert len(home.deaths_s) == 1


def test_one_that_dies_three_times_before_it_is_up_ends_the_server(
    parts: Callable[..., Household], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = parts()
    home.start()
    monkeypatch.setattr(processes, "MOST_PAUSE_S", 0.1)
    monkeypatch.setattr(processes, "LOOK_S", 0.02)
    home.gate.words = ("gate", "dies")
    assert home.gate.child is not None
    home.gate.child.kill()
    with pytest.raises(TrocarError) as caught:
        home.look_after()
    assert (caught.value.code, caught.value.path) == ("start_failed", "gate")
    assert len(home.deaths_s) == processes.TRIES


def test_one_that_does_not_stop_is_killed(
    parts: Callable[..., Household], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_S", dict.fromkeys(("front", "gate", "worker"), 0.5))
    home = parts(worker="stuck")
    home.start()
    home.stop()
    assert home.worker.child is not None
    assert home.worker.child.returncode == -signal.SIGKILL


SECRETS = {
    "PGPASSWORD": "hunter2",
    "DATABASE_URL": "postgresql://u:hunter2@h/d",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_SESSION_TOKEN": "hunter2",
    "GOOGLE_APPLICATION_CREDENTIALS": "/hunter2",
    "HF_TOKEN": "hunter2",
    "HUGGING_FACE_HUB_TOKEN": "hunter2",
    "TROCAR_API_KEY": "trk_hunter2",
    "TROCAR_LEDGER": "postgresql://u:hunter2@h/d",
    "TORCH_HUB_TOKEN": "hunter2",
    "NVIDIA_API_KEY": "hunter2",
    "SOMETHING_NEW": "hunter2",
    "HTTPS_PROXY": "http://u:hunter2@h",
}
NEEDED = {
    "PATH": "/bin", "HOME": "/h", "LANG": "C.UTF-8", "LC_ALL": "C", "TMPDIR": "/t", "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/l",
    "HF_HOME": "/hf", "TROCAR_CACHE": "/c", "PYTORCH_CUDA_ALLOC_CONF": "x", "PYTHONHASHSEED": "0",
}  # fmt: skip


@pytest.mark.parametrize("part", ["worker", "gate", "front"])
def test_what_is_on_no_list_is_not_inherited(part: str) -> None:
    found = environment(part, {**SECRETS, **NEEDED})
    assert set(found) == {*NEEDED, *(("PGPASSWORD", "TROCAR_LEDGER") if part == "gate" else ())}
    assert all(({**SECRETS, **NEEDED})[name] == value for name, value in found.items())


def test_the_processes_themselves_find_no_secret(
    parts: Callable[..., Household], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    home = parts()
    home.start()
    held = {p.name: Path(f"/proc/{p.child.pid}/environ").read_bytes() for p in home.all if p.child}
    assert [name for name, bytes_ in held.items() if b"hunter2" in bytes_] == ["gate"]
    assert b"AWS" not in held["gate"]
    assert b"PATH=" in held["worker"]


def test_a_child_ends_when_its_parent_does() -> None:
    code = "import time; from trocar.cli import child; child.watch_parent(9); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    time.sleep(1.0)
    assert process.poll() is None
    process.stdin.close()  # type: ignore[union-attr]
    assert process.wait(20) == -signal.SIGTERM


def test_one_without_a_parent_says_nothing() -> None:
    import gc

    child.watch_parent(-1)
    try:
        child.say_ready(-1)
        reading, writing = os.pipe()
        child.say_ready(writing, child.ALONE)
        assert os.read(reading, 10) == b"-"
        os.close(reading)
    finally:
        gc.unfreeze()
