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
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cli_server
import httpx
from docs_blocks import blocks
from host_room import COME_UP_S, NETWORK, Door, code, make_model, tree, until

import trocar

PAGE = Path(__file__).resolve().parents[2] / "docs" / "isolation.md"
USERS = {"trocar-worker": 29001, "trocar-gate": 29002, "trocar-front": 29003}
STAYING = ("worker", "gate", "front")
RUN = {
    "model": "tiny",
    "prompts": ["abc"],
    "program": {"nodes": [{"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}]},
}
LINEAGE, SERVED = "tiny", "smollm2-135m-instruct"


def commands() -> list[list[str]]:
    """Every line of every block of the page, as words."""
    found = [b for b in blocks(PAGE.read_text()) if b.language == "text"]
    return [shlex.split(line) for b in found for line in b.text.splitlines() if line]


def _is_open(path: Path) -> bool:
    """Whether every user may read a file or folder."""
    real = path.resolve()
    return bool(real.stat().st_mode & 0o004) and all(p.stat().st_mode & 0o001 for p in real.parents)


def _link(source: str, target: str) -> str:
    """A second name, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _opened(path: Path, root: Path) -> Path:
    """A folder, or where every user may read it under `root`."""
    if _is_open(path):
        return path
    there = root / path.name
    ignored = shutil.ignore_patterns("site-packages", "test")
    shutil.copytree(path, there, copy_function=_link, ignore=ignored, dirs_exist_ok=True)
    return there


def interpreter_for_all(root: Path) -> tuple[str, dict[str, str]]:
    """A Python with our packages that every user may run, and its settings: an installation may be root's alone.

    Args:
        root: an empty folder, for what must be put where others may read it.
    """
    python = Path(sys.executable).resolve()
    source, packages = Path(trocar.__file__).parents[1], Path(sysconfig.get_paths()["purelib"])
    path = [str(_opened(source, root)), str(_opened(packages, root / "packages"))]
    settings = {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    if _is_open(python):
        return str(python), settings
    for folder in (root / "bin", root / "lib"):
        folder.mkdir()
    _opened(Path(sysconfig.get_paths()["stdlib"]), root / "lib")
    for library in Path(sys.base_prefix, "lib").glob("libpython*"):
        _link(str(library.resolve()), str(root / "lib" / library.name))
    return _link(str(python), str(root / "bin" / python.name)), {
        **settings,
        "LD_LIBRARY_PATH": str(root / "lib"),
    }


_LEAVE = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x40000000) != 0)"
LEAVES = subprocess.run([sys.executable, "-c", _LEAVE], check=False).returncode == 0
"""Whether `unshare --net` works here."""


_BECOME = """
import ctypes, os, sys

uid, alone, *command = sys.argv[1:]
if alone == "alone" and ctypes.CDLL(None).unshare(0x40000000) != 0:
    sys.exit("the network cannot be left")
if uid:
    os.setgroups([])
    os.setresgid(*[int(uid)] * 3)
    os.setresuid(*[int(uid)] * 3)
os.execv(command[0], command)
"""


@dataclass
class Machine:
    """Where the commands of the page run.

    Attributes:
        root: stands for `/`; its path is short, because those of sockets are.
        users: ids by name; empty when everything runs as us.
        python: an interpreter that all of them may run.
        settings: its environment.
        port: stands for the page's.
        running: by the name of the command.
    """

    root: Path
    model: Path
    port: int
    users: Mapping[str, int] = field(default_factory=dict)
    python: str = sys.executable
    settings: Mapping[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, word: str) -> str:
        """A word of the page, with what it names on this machine."""
        word = re.sub(r"^/srv/trocar/models/[^/]+/", f"{self.model}/", word)
        word = re.sub(r"^/srv/trocar$", str(self.model.parents[1]), word)
        word = re.sub(r"^/(var/lib|run)/", rf"{self.root}/\1/", word)
        word = re.sub(rf"^{SERVED}$", str(self.model), word)
        if word in USERS:
            return str(self.users.get(word, os.geteuid()))
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
        alone = words[:2] == ["unshare", "--net"]
        words = words[2:] if alone else words
        if words[0] == "runuser":
            assert words[1:4:2] == ["-u", "--"], words
            return self._trocar(words[2], words[4:], alone)
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

    def _trocar(
        self, user: str, words: list[str], alone: bool = False
    ) -> subprocess.CompletedProcess[str] | None:
        assert words[0] == "trocar", words
        command = [self.python, "-m", "trocar.cli.app", *map(self.here, words[1:])]
        env = {**cli_server.environment(self.root), **self.settings, **self.variables}
        if words[1] in STAYING[:2] and not LEAVES:
            command += ["--network", "allowed" if self.users else NETWORK]
        command = self.of(user, *command, alone=alone and LEAVES)
        if words[1] not in STAYING:
            return subprocess.run(
                command, env=env, cwd=self.root, capture_output=True, text=True, timeout=120, check=False
            )
        with (self.root / f"{words[1]}.said").open("ab") as sink:
            self.running[words[1]] = subprocess.Popen(
                command, env=env, cwd=self.root, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        return None

    def of(self, user: str, *command: str, alone: bool = False) -> list[str]:
        """A command of a user, as `unshare --net runuser -u` would start it."""
        uid = str(self.users.get(user, ""))
        return [sys.executable, "-c", _BECOME, uid, "alone" if alone else "", *command]

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


@contextmanager
def machine(**options: Any) -> Iterator[Machine]:
    """An empty machine with a model, under a short path that every user may walk."""
    root = Path(tempfile.mkdtemp(prefix="pg-"))
    root.chmod(0o755)
    parts = tree()
    made = Machine(
        root,
        make_model(root / "srv", parts.random_llama(), parts.byte_tokenizer()),
        free_port(),
        **options,
    )
    for folder in (root / "srv", *(root / "srv").rglob("*")):
        folder.chmod(0o755 if folder.is_dir() else 0o644)
    try:
        yield made
    finally:
        made.close()


def verb(words: list[str]) -> str:
    """What a line of the page does: `worker`, `ledger freeze`, `install`."""
    at = words.index("trocar") if "trocar" in words else -1
    if at < 0:
        return words[0]
    return " ".join(w for w in words[at + 1 : at + 3] if not w.startswith("-"))


def prepare(made: Machine) -> None:
    """All of the page up to the three commands, in its order; then those, the last first."""
    lines = commands()
    first = next(i for i, words in enumerate(lines) if verb(words) in STAYING)
    for words in lines[:first]:
        ran = made.do(words)
        assert ran is None or ran.returncode == 0, ran.stdout + ran.stderr
    for name in reversed(STAYING):
        start(made, name)


def start(made: Machine, name: str) -> None:
    [words] = [w for w in commands() if verb(w) == name]
    made.do(words)


def door(made: Machine) -> Door:
    """The server, once it answers."""
    until(lambda: "gate ready" in made.said("gate") or made.running["gate"].poll() is not None, COME_UP_S)
    assert made.running["gate"].poll() is None, made.said("gate")
    secret = re.search(r"TROCAR_API_KEY=(\S+)", made.said("gate"))
    assert secret is not None
    found = Door(f"http://127.0.0.1:{made.port}", secret[1])
    until(lambda: answers(found), COME_UP_S)
    return found


def answers(found: Door) -> bool:
    try:
        return found.send("GET", "/healthz").status_code == 200
    except httpx.TransportError:
        return False


def ask(found: Door) -> str:
    """How a request ends: `ok` or a code."""
    heard = found.send("POST", "/v1/runs", RUN)
    if heard.status_code == 202:
        heard = found.result(heard.json()["job"])
    return "ok" if heard.status_code == 200 else code(heard)
