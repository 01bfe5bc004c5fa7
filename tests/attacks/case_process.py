"""A real server process on loopback, and bytes on real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import trocar

START_S = 120.0


@dataclass
class Running:
    """One started server; `keys` are secrets of the tenants mallory and victor."""

    process: subprocess.Popen[bytes]
    url: str
    keys: dict[str, str]
    out: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def http(self, name: str | None = None, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[name]}"} if name else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=options.pop("timeout", 30.0), **options
        )

    def connect(self, timeout_s: float = 10.0) -> socket.socket:
        return socket.create_connection(self.address, timeout_s)

    def talk(self, raw: bytes, wait_s: float = 2.0) -> bytes:
        """What the server says to these bytes, until it closes or is silent for `wait_s`."""
        said = b""
        with self.connect(wait_s) as wire, contextlib.suppress(TimeoutError, ConnectionError):
            wire.sendall(raw)
            wire.shutdown(socket.SHUT_WR)
            while part := wire.recv(65536):
                said += part
        return said

    def healthy(self) -> bool:
        with self.http() as http:
            return http.get("/healthz").status_code == 200

    def dialled(self) -> list[str]:
        """Remote ends of this process's sockets that are not clients of its own port."""
        inodes = set()
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found = re.match(r"socket:\[(\d+)\]", os.readlink(fd))
                inodes |= {found[1]} if found else set()
        port, strange = f"{self.address[1]:04X}", []
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/{self.process.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in inodes and fields[1].rpartition(":")[2] != port:
                    strange.append(f"{table} {fields[2]}")
        return strange

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """Open files and sockets of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.process.kill()
        self.process.wait(20)


def start(folder: Path) -> Running:
    """Starts a server and waits until it answers."""
    source = str(Path(trocar.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    out = folder / "out.txt"
    with out.open("wb") as sink:
        command = [sys.executable, str(Path(__file__).with_name("case_server.py")), str(folder)]
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
    ready, deadline = folder / "ready.json", time.monotonic() + START_S
    while not ready.is_file():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(out.read_text())
        time.sleep(0.05)
    told = json.loads(ready.read_text())
    return Running(process, told["url"], told["keys"], out)
