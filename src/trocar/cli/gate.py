"""`trocar gate`: the process with the keys and the books of a server in three parts. `trocar serve --isolation host`
starts it.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final

import typer

from trocar import errors
from trocar.cli.audit import AnchorsOption
from trocar.cli.child import ReadyOption, say_ready, watch_parent
from trocar.cli.folder import DataOption, Folder
from trocar.cli.logs import log_to_stderr
from trocar.cli.serve_options import Level, LogLevel, Network, PolicyFile, SaveKey
from trocar.cli.users import FrontUser, WorkerUser, uid_of

LOAD_S: Final = 600.0
DRAIN_S: Final = 1.0
APART: Final = "isolation: host. The worker is a process of another user ({uid}; this is {mine})."
TOGETHER: Final = (
    "isolation: host. The worker is a process of this user ({uid}), so it could open the ledger if it were taken over: "
    "docs/isolation.md says how to run it as another."
)


def gate(
    model: Annotated[list[str], typer.Option(metavar="NAME", help="Model that the worker runs; repeat it.")],
    worker: Annotated[Path, typer.Option(help="Path of the unix socket of the worker.")],
    socket: Annotated[
        Path, typer.Option(help="Path of the unix socket to listen on; not in the worker's folder.")
    ],
    worker_user: WorkerUser = None,
    front_user: FrontUser = None,
    network: Annotated[
        Network, typer.Option(help="`allowed` also takes a worker that is in the machine's network.")
    ] = Network.closed,
    url: Annotated[str, typer.Option(help="Where the front answers, for what is printed.")] = "",
    data: DataOption = None,
    policy: PolicyFile = None,
    anchors: AnchorsOption = None,
    log_level: Level = LogLevel.warning,
    save_key: SaveKey = False,
    ready_fd: ReadyOption = -1,
) -> None:
    """Check, charge and release for fronts; part of `trocar serve --isolation host`."""
    from trocar.cli.access import Rulebook, access, open_gate, print_access, saved_secret
    from trocar.cli.reload import reread

    _require_apart(worker, socket)
    worker_uid, front_uid = uid_of(worker_user, "--worker-user"), uid_of(front_user, "--front-user")
    stop = _stopping()
    watch_parent(ready_fd)
    log_to_stderr(log_level)
    folder = Folder.at(data)
    folder.make()
    from trocar.host.gate.desk import Desk
    from trocar.host.gate.house import assemble
    from trocar.host.streams import listen

    with ExitStack() as stack:
        rules = Rulebook(policy or folder.policy, named=policy is not None)
        opened = open_gate(folder, rules, anchors or folder.anchors, stack)
        secret = saved_secret(opened) if save_key else None
        service = assemble(
            model, folder.root, worker, opened, within_s=LOAD_S, worker_uid=worker_uid, network=network.value
        )
        stack.callback(service.close)
        for facts in service.facts.values():
            print(f"model {facts.name}: {len(facts.sites)} sites, facts pinned")
        print_access(access(opened, url, secret, save_key), url, next(iter(service.facts)))
        desk = Desk(service, listen(socket, 128, front_uid))
        stack.callback(desk.close)
        threading.Thread(target=desk.serve, name="trocar-accept", daemon=True).start()
        signal.signal(signal.SIGHUP, lambda *_: reread(lambda: opened.change_policy(rules.read())))
        say_ready(ready_fd)
        if ready_fd < 0:
            print(f"{_said(worker)}\ngate ready {socket}", flush=True)
        stop.wait()
        service.halt()  # what waits for a result hears of it while the front still can tell
        threading.Event().wait(DRAIN_S)


def _stopping() -> threading.Event:
    """Set when the process is asked to end."""
    stop = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stop.set())
    return stop


def _said(worker: Path) -> str:
    """Whose process the worker is; its socket belongs to whoever made it."""
    uid, mine = worker.stat().st_uid, os.geteuid()
    return (TOGETHER if uid == mine else APART).format(uid=uid, mine=mine)


def _require_apart(worker: Path, socket: Path) -> None:
    """Refuses one folder for both sockets: whoever listens in a folder can take every place in it."""
    if worker.parent.resolve() == socket.parent.resolve():
        raise errors.refuse(
            "bad_argument",
            "--socket",
            "the worker's socket lies in the same folder, so the worker could take the gate's place for fronts",
            next_step="Give the gate's socket a folder that the worker's user cannot write.",
        )
