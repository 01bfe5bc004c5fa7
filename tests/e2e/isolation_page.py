"""docs/isolation.md as an operator types it: every command of the page, on folders, a port and a model of a test.

With three users it is the page to the letter, but for names; as one user everything belongs to that one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cli_server
from docs_blocks import blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "isolation.md"
USERS = {"trocar-worker": 29001, "trocar-gate": 29002, "trocar-front": 29003}
LINEAGE, SERVED = "tiny", "smollm2-135m-instruct"


def commands() -> list[list[str]]:
    """Every line of every block of the page, as words."""
    found = [b for b in blocks(PAGE.read_text()) if b.language == "text"]
    return [shlex.split(line) for b in found for line in b.text.splitlines() if line]


def interpreter_of_others() -> tuple[str, ...] | None:
    """A Python with our packages that another user may run; None when there is none, or we may not become one."""
    if os.geteuid() != 0:
        return None
    uid = USERS["trocar-worker"]
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info[1]}"):
        try:
            ran = subprocess.run(
                [python, "-c", "import trocar.cli.tree, torch, sqlalchemy"], user=uid, group=uid, extra_groups=[],
                env=_environment(Path("/")), capture_output=True, check=False, timeout=120,
            )  # fmt: skip
        except OSError:
            continue
        if ran.returncode == 0:
            return (python, "-m", "trocar.cli.app")
    return None


def _environment(home: Path) -> dict[str, str]:
    plain = cli_server.environment(home)
    packages = sysconfig.get_paths()["purelib"]
    return {**plain, "PYTHONPATH": f"{plain['PYTHONPATH']}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Machine:
    """Where the commands of the page run.

    Attributes:
        root: stands for `/`; its path is short, because those of sockets are.
        users: ids by name; empty when everything runs as us.
        port: stands for the page's.
        running: by the name of the command.
    """

    root: Path
    model: Path
    port: int
    users: Mapping[str, int] = field(default_factory=dict)
    trocar: tuple[str, ...] = (sys.executable, "-m", "trocar.cli.app")
    variables: dict[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, word: str) -> str:
        """A word of the page, with what it names on this machine."""
        word = re.sub(r"^/srv/trocar/models/[^/]+/", f"{self.model}/", word)
        word = re.sub(r"^/srv/trocar$", str(self.model.parents[1]), word)
        word = re.sub(r"^/(var/lib|run)/", rf"{self.root}/\1/", word)
        word = re.sub(rf"^{SERVED}$", str(self.model), word)
        return re.sub(r"^smollm2-135m$", LINEAGE, word).replace("8765", str(self.port))

    def at(self, path: str) -> Path:
        return Path(self.here(path))

    def said(self, name: str) -> str:
        return (self.root / f"{name}.said").read_text()

    def do(self, words: list[str]) -> subprocess.CompletedProcess[str] | None:
        """One command; those that stay are in `running`.

        Raises:
            AssertionError: a command of a kind that no test knows.
        """
        if words[0] == "runuser":
            assert words[1:4:2] == ["-u", "--"], words
            return self._trocar(words[2], words[4:])
        if words[0] == "trocar":
            return self._trocar("", words)
        plain = {
            "useradd": self._useradd,
            "install": self._install,
            "export": self._export,
            "chgrp": self._chgrp,
            "chmod": self._chmod,
        }
        assert words[0] in plain, words
        plain[words[0]](words[1:])
        return None

    def _useradd(self, words: list[str]) -> None:
        assert words[:2] == ["--system", "--user-group"]
        assert words[2] in USERS

    def _install(self, words: list[str]) -> None:
        assert [words[i] for i in (0, 1, 3, 5)] == ["-d", "-o", "-g", "-m"]
        owner, group, mode = words[2], words[4], int(words[6], 8)
        for path in map(self.here, words[7:]):
            Path(path).mkdir(parents=True, exist_ok=True)
            if self.users:
                os.chown(path, self.users[owner], self.users[group])
            os.chmod(path, mode)

    def _export(self, words: list[str]) -> None:
        name, _, value = words[0].partition("=")
        self.variables[name] = self.here(value)

    def _chgrp(self, words: list[str]) -> None:
        if self.users:
            os.chown(self.here(words[1]), -1, self.users[words[0]])

    def _chmod(self, words: list[str]) -> None:
        Path(self.here(words[1])).chmod(int(words[0], 8))

    def _trocar(self, user: str, words: list[str]) -> subprocess.CompletedProcess[str] | None:
        assert words[0] == "trocar", words
        command = [*self.trocar, *map(self.here, words[1:])]
        env = {**_environment(self.root), **self.variables}
        uid = self.users.get(user)
        if words[1] not in ("worker", "gate", "front"):
            return subprocess.run(
                command, env=env, user=uid, group=uid, extra_groups=None if uid is None else [],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        with (self.root / f"{words[1]}.said").open("ab") as sink:
            self.running[words[1]] = subprocess.Popen(
                command, env=env, user=uid, group=uid, extra_groups=None if uid is None else [],
                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            )  # fmt: skip
        return None

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends one of the three; its exit code."""
        process = self.running.pop(name)
        process.send_signal(how)
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def close(self) -> None:
        for name in ("front", "gate", "worker"):
            if name in self.running:
                self.stop(name)
        shutil.rmtree(self.root, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
