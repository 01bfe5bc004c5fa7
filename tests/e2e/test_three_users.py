"""Three users as docs/isolation.md sets them up: what a worker that is wholly taken over can reach, which is nothing.

Root, who runs the tests in CI, becomes three users. Anybody else is one user for all three: then nothing is out of
reach but a place where somebody listens, and the gate says so.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_room import COME_UP_S, Door, until
from isolation_page import LEAVES, USERS, Machine, ask, door, interpreter_for_all, machine, prepare, start

pytestmark = pytest.mark.e2e
ROOT = os.geteuid() == 0
TRIES = """
import json, os, signal, socket, sys, tempfile
from pathlib import Path

places = json.loads(sys.argv[1])

def gate_of(path):
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(path)

def heard_by(path, uid):
    from trocar.errors import TrocarError
    from trocar.host.front.front import Front
    front = Front(Path(path), uid)
    try:
        front.health()
    except TrocarError as e:
        raise PermissionError(e.code)
    finally:
        front.close()

def take(path):
    mine = str(Path(path).parent / "mine")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(mine)
        there.listen(1)
        os.rename(mine, path)

def attach(pid):
    open(f"/proc/{pid}/mem", "rb").close()

def begin(path):
    from trocar.errors import TrocarError
    from trocar.host.streams import listen
    try:
        listen(Path(path), 1).close()
    except TrocarError as e:
        raise PermissionError(e.code)

tries = {
    "call the gate": lambda: gate_of(places["gate"]),
    "be heard by it": lambda: heard_by(places["gate"], places["uid"]),
    "take its place": lambda: take(places["gate"]),
    "listen at its place": lambda: begin(places["gate"]),
    "remove its socket": lambda: os.unlink(places["gate"]),
    "rename its folder": lambda: os.rename(Path(places["gate"]).parent, Path(places["gate"]).parent.with_name("away")),
    "list its folder": lambda: os.listdir(Path(places["gate"]).parent),
    "open the ledger": lambda: open(places["ledger"], "rb").close(),
    "write the ledger": lambda: open(places["ledger"], "r+b").close(),
    "list the gate's data": lambda: os.listdir(Path(places["ledger"]).parent),
    "sign exports": lambda: open(places["signing"], "rb").close(),
    "write anchors": lambda: open(Path(places["anchors"]) / "x", "wb").close(),
    "read the gate's memory": lambda: attach(places["pid"]),
    "read its environment": lambda: open(f"/proc/{places['pid']}/environ", "rb").close(),
    "stop the gate": lambda: os.kill(places["pid"], 0),
    "become root": lambda: os.setuid(0),
}
done = []
for name in sys.argv[2:] or tries:
    try:
        tries[name]()
        done.append(name)
    except PermissionError:
        pass
print(json.dumps({"done": done, "tries": len(sys.argv[2:] or tries)}))
"""


@pytest.fixture(scope="module")
def made() -> Iterator[Machine]:
    with machine(users=USERS if ROOT else {}) as here:
        if ROOT:
            here.root.joinpath("python").mkdir()
            here.python, here.settings = interpreter_for_all(here.root / "python")
        prepare(here)
        yield here


@pytest.fixture(scope="module")
def served(made: Machine) -> Door:
    return door(made)


def attempt(made: Machine, user: str, *names: str) -> set[str]:
    """What a process of this user gets done of what it tries."""
    places = {
        "gate": str(made.at("/run/trocar-gate/socket")),
        "ledger": str(made.at("/var/lib/trocar-gate/ledger.db")),
        "signing": str(made.at("/var/lib/trocar-gate/airlock.ed25519")),
        "anchors": str(made.at("/var/lib/trocar-anchors")),
        "pid": made.running["gate"].pid,
        "uid": made.users.get("trocar-gate", os.geteuid()),
    }
    ran = subprocess.run(
        made.of(user, made.python, "-c", TRIES, json.dumps(places), *names), env={**os.environ, **made.settings},
        cwd=made.root, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["tries"] == (len(names) or 16)
    return set(said["done"])


def test_three_users_serve_from_end_to_end(made: Machine, served: Door) -> None:
    assert ask(served) == "ok"
    told = served.send("GET", "/v1/capabilities").json()
    assert told["isolation"] == "host"
    assert told["network"] == "closed" or not LEAVES
    said = made.said("gate")
    apart = "The worker is a process of another user (29001; this is 29002)"
    assert (apart in said) is ROOT
    assert ("The worker is a process of this user" in said) is not ROOT
    if ROOT:
        status = {n: Path(f"/proc/{p.pid}/status").read_text() for n, p in made.running.items()}
        uids = {n: {int(u) for u in _field(text, "Uid")} for n, text in status.items()}
        assert uids == {"worker": {29001}, "gate": {29002}, "front": {29003}}
        assert {_field(text, "CapEff")[0].strip("0") for text in status.values()} == {""}


def _field(status: str, name: str) -> list[str]:
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return line.split()[1:]


def test_a_worker_that_is_taken_over_reaches_nothing_of_the_gate(made: Machine, served: Door) -> None:
    if not ROOT:  # one user: but for the place where the gate listens, and root, there is no wall
        assert attempt(made, "trocar-worker", "listen at its place", "become root") == set()
        assert attempt(made, "trocar-worker", "open the ledger") == {"open the ledger"}
        return
    assert attempt(made, "trocar-worker") == set()
    assert attempt(made, "trocar-front") == {"call the gate", "be heard by it"}
    own = {"open the ledger", "sign exports", "list its folder", "stop the gate", "write anchors"}
    assert attempt(made, "trocar-gate", *own, "listen at its place") == own  # so each try can succeed
    assert ask(served) == "ok"


def test_each_reaches_what_the_table_says(made: Machine, served: Door) -> None:
    assert ask(served) == "ok"
    places = {
        "weights": made.model / "model.safetensors",
        "rows": made.at("/var/lib/trocar-worker/store"),
        "its log": made.at("/var/lib/trocar-worker/worker.log"),
        "ledger": made.at("/var/lib/trocar-gate/ledger.db"),
        "anchors": made.at("/var/lib/trocar-anchors"),
        "worker": made.at("/run/trocar-worker/socket"),
        "gate": made.at("/run/trocar-gate/socket"),
    }
    reach = {user: {n for n, at in places.items() if reaches(made, user, at)} for user in USERS}
    if ROOT:
        assert reach == {
            "trocar-worker": {"weights", "rows", "its log", "worker"},
            "trocar-gate": {"ledger", "anchors", "worker", "gate"},
            "trocar-front": {"gate"},
        }
    else:
        assert reach == {user: set(places) for user in USERS}


LOOK = """
import os, socket, stat, sys
path = sys.argv[1]
if stat.S_ISSOCK(os.stat(path).st_mode):
    socket.socket(socket.AF_UNIX).connect(path)
else:
    os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
"""


def reaches(made: Machine, user: str, path: Path) -> bool:
    """Whether a process of this user can read the file or folder, or call the socket."""
    assert path.exists(), path
    ran = subprocess.run(
        made.of(user, made.python, "-c", LOOK, str(path)), env={**os.environ, **made.settings}, cwd=made.root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 or "PermissionError" in ran.stderr, ran.stderr
    return ran.returncode == 0


BE_THE_GATE = """
import os, socket, sys
from pathlib import Path

path = Path(sys.argv[1])
with socket.socket(socket.AF_UNIX) as there:
    mine = str(path.with_name("mine"))
    there.bind(mine)
    os.chmod(mine, 0o777)
    there.listen(8)
    os.rename(mine, path)
    print("taken", flush=True)
    while True:
        came, _ = there.accept()
        print(f"heard {len(came.recv(100))}", flush=True)
        came.close()
"""


def test_a_folder_with_a_wrong_mode_is_no_way_in(made: Machine, served: Door) -> None:
    """An operator's mistake: everybody may write where the gate listens. The kernel still says who is there."""
    socket_path, folder = made.at("/run/trocar-gate/socket"), made.at("/run/trocar-gate")
    if not ROOT:  # whoever is the same user passes for the gate; nobody else is there to be told apart
        called = {"call the gate", "be heard by it"}
        assert attempt(made, "trocar-worker", *called) == called
        return
    mode = folder.stat().st_mode & 0o7777
    try:
        folder.chmod(0o777)
        socket_path.chmod(0o777)
        assert attempt(made, "trocar-worker", "call the gate", "be heard by it") == {"call the gate"}
        assert "user 29001 is at the other end" in made.said("gate")
        evil = subprocess.Popen(
            made.of("trocar-worker", made.python, "-c", BE_THE_GATE, str(socket_path)),
            env={**os.environ, **made.settings}, cwd=made.root, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert evil.stdout is not None
        assert evil.stdout.readline() == "taken\n"
        assert made.stop("front") == 0  # connections that it had are the gate's; a new front has none
        start(made, "front")
        until(lambda: _refuses(served), COME_UP_S)
        assert "user 29001 is at the other end" in made.said("front")
        heard = [evil.stdout.readline().strip()]
        evil.terminate()
        heard += evil.stdout.read().split("\n")
        evil.stdout.close()
        evil.wait(20)
        assert {line for line in heard if line} == {"heard 0"}
    finally:
        folder.chmod(mode)
    made.stop("gate")
    start(made, "gate")
    until(lambda: ask(served) == "ok", COME_UP_S)


def _refuses(served: Door) -> bool:
    try:
        return ask(served) == "ledger_unavailable"
    except OSError:
        return False
    except Exception as e:
        if "Connect" in type(e).__name__:
            return False
        raise


def test_a_worker_in_the_network_does_not_start(made: Machine, served: Door) -> None:
    """A worker that is another user than its gate, started without `unshare --net`."""
    assert ask(served) == "ok"
    other = "trocar-gate" if ROOT else str(os.geteuid() + 1)
    gate = made.here(other)
    where = made.root / "elsewhere"
    where.mkdir()
    if ROOT:
        os.chown(where, USERS["trocar-worker"], USERS["trocar-worker"])
    words = (
        "worker",
        "--model",
        "tiny",
        "--data",
        str(where),
        "--socket",
        str(where / "w"),
        "--gate-user",
        gate,
    )
    env: dict[str, Any] = {**os.environ, **made.settings, "TROCAR_CACHE": str(made.model.parents[1])}
    ran = subprocess.run(
        made.of("trocar-worker", made.python, "-m", "trocar.cli.app", *words), env=env, cwd=made.root,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    shutil.rmtree(where)
    others = {name for _, name in socket.if_nameindex()} - {"lo"}
    assert others, "the tests themselves run without a network"
    assert ran.returncode == 2
    assert "[network_open] at --network" in ran.stderr
