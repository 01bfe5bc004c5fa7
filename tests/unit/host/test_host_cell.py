"""What the worker's process gives up, and what it can still tell afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trocar

PART = """
import ctypes, json, os, socket, sys, tempfile
from pathlib import Path
from trocar.host import peers
from trocar.host.streams import connect, listen
from trocar.host.worker import cell

uid = int(sys.argv[1])
with socket.socketpair()[0] as before:
    if uid != os.geteuid():  # as another user, who may not make a namespace of the network alone
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after an exec
    closed = cell.close_network()
    names = [name for _, name in socket.if_nameindex()]
    with tempfile.TemporaryDirectory() as root, listen(Path(root) / "s", 1, uid) as listener:
        connect(Path(root) / "s", uid).close()
        heard = listener.accept()[0]
        heard.close()
    def named(uid):
        try:
            peers.require(before, uid, Path("before"))
        except peers.Stranger:
            return False
        return True
    print(json.dumps({
        "closed": closed, "interfaces": names, "uid": os.geteuid(),
        "before": [named(0), named(65534)],
    }))
"""


def ran(code: str, *words: str) -> Any:
    """What a Python of its own prints."""
    source = str(Path(trocar.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_worker_without_rights_knows_its_own_user_and_no_other() -> None:
    """In a user namespace all others look alike, so that none of them can be named."""
    uid = os.geteuid() or 1
    found = ran(PART, str(uid))
    assert found["uid"] == uid
    if found["closed"]:
        assert found["interfaces"] == ["lo"]
        assert found["before"] == [False, False]  # neither root, nor the number that all the others have now


def test_a_worker_with_rights_knows_everybody() -> None:
    found = ran(PART, str(os.geteuid()))
    assert found["uid"] == os.geteuid()
    if os.geteuid() == 0 and found["closed"]:
        assert (found["interfaces"], found["before"]) == (["lo"], [True, False])


EMPTY = """
import ctypes, json, os, socket, sys
from trocar.host.worker import cell

libc = ctypes.CDLL(None)
entered = libc.unshare(0x40000000) == 0 or libc.unshare(0x50000000) == 0
allowed = cell.can_close_network()
cell.ctypes.CDLL = lambda *_, **__: type("Nothing", (), {"unshare": lambda *_: -1})  # from here on it is not
said = {"quiet": cell.close_network(), "could": cell.can_close_network()}
kind, where = {
    "tcp": (socket.SOCK_STREAM, socket.AF_INET), "tcp6": (socket.SOCK_STREAM, socket.AF_INET6),
    "udp": (socket.SOCK_DGRAM, socket.AF_INET), "named": (socket.SOCK_STREAM, socket.AF_UNIX),
}[sys.argv[1]]
with socket.socket(where, kind) as there:
    there.bind("\\0name" if sys.argv[1] == "named" else ("::" if where == socket.AF_INET6 else "0.0.0.0", 0))
    if kind == socket.SOCK_STREAM:
        there.listen(1)
    said["spoken to"] = cell.close_network()
print(json.dumps({"entered": entered, "allowed": allowed, **said}))
"""


@pytest.mark.parametrize("what", ["tcp", "tcp6", "udp", "named"])
def test_a_network_is_empty_when_there_is_nobody_in_it(what: str) -> None:
    """Who may make no namespace can be started in one: a container without a network, a unit with a private one."""
    found = ran(EMPTY, what)
    assert found["entered"] or not found["allowed"]
    if found["entered"]:
        assert (found["quiet"], found["could"], found["spoken to"]) == (True, True, False)
    else:  # the machine's own, in which somebody always speaks, if only because it has an interface
        assert (found["quiet"], found["could"], found["spoken to"]) == (False, False, False)


OTHERS = """
import json, os, sys
from trocar.host.worker import cell

before = os.readlink("/proc/self/ns/user")
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(1, 1, 1)
    os.setresuid(1, 1, 1)
said = cell.close_network(knows_others=True)
print(json.dumps({"said": said, "moved": os.readlink("/proc/self/ns/user") != before}))
"""


def test_who_must_know_other_users_does_not_go_where_they_have_no_names() -> None:
    """As a worker without rights whose gate is another user's; only an empty network would do."""
    assert ran(OTHERS)["moved"] is False
