"""What the worker's process gives up, and what it can still tell afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
