"""`trocar worker`: the process with the weights of a server in three parts. `trocar serve --isolation host` starts it.

What it prints goes to `worker.log` in the data folder and nowhere else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final

import typer

from trocar import errors
from trocar.cli.child import ALONE, READY, ReadyOption, say_ready, watch_parent
from trocar.cli.folder import DataOption, Folder
from trocar.cli.serve_options import Network
from trocar.cli.users import GateUser, uid_of

LOG: Final = "worker.log"
SocketOption = Annotated[Path, typer.Option("--socket", help="Path of the unix socket to listen on.")]


def worker(
    model: Annotated[list[str], typer.Option(metavar="NAME", help="Model to run; repeat it for several.")],
    socket: SocketOption,
    gate_user: GateUser = None,
    network: Annotated[
        Network, typer.Option(help="`allowed` goes on where the machine's network cannot be left.")
    ] = Network.closed,
    data: DataOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    step_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in one forward pass.")] = None,
    kv_gib: Annotated[
        float | None, typer.Option(min=0.01, help="Memory for keys and values, in GiB.")
    ] = None,
    tenant_gib: Annotated[
        float, typer.Option(min=0.001, help="What one tenant may keep in the store, in GiB.")
    ] = 64.0,
    ready_fd: ReadyOption = -1,
) -> None:
    """Run models for a gate, without a network; part of `trocar serve --isolation host`."""
    from trocar.host.worker import cell

    gate_uid = uid_of(gate_user, "--gate-user")
    folder = Folder.at(data)
    folder.make()
    alone = cell.close_network(knows_others=gate_uid not in (None, os.geteuid()))  # before any thread
    if not alone and network is Network.closed:
        raise network_open("this process")
    cell.keep_inside()
    cell.speak_into(folder.root / LOG)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watch_parent(ready_fd)
    _log_here(network_closed=alone)
    from trocar.host.streams import listen
    from trocar.host.worker.house import open_bench

    kv_bytes = None if kv_gib is None else int(kv_gib * (1 << 30))
    tenant_bytes = int(tenant_gib * (1 << 30))
    with ExitStack() as stack:
        bench = open_bench(
            model,
            folder.store,
            stack,
            threads=threads,
            step_tokens=step_tokens,
            kv_bytes=kv_bytes,
            tenant_bytes=tenant_bytes,
            alone=alone,
            give_up=cell.end,
        )
        listener = listen(socket, 8, gate_uid)
        stack.callback(listener.close)
        print("worker: ready", file=sys.stderr, flush=True)
        say_ready(ready_fd, READY if alone else ALONE)
        try:
            bench.serve(listener)
        except KeyboardInterrupt:
            logging.getLogger("trocar").warning("worker: stopped")


def _log_here(*, network_closed: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    said = "closed" if network_closed else "open: a namespace was not allowed, and the operator allowed that"
    print(f"worker: network {said}", file=sys.stderr, flush=True)


def network_open(who: str) -> errors.TrocarError:
    """The refusal of a worker that would have the machine's network."""
    return errors.refuse("network_open", "--network", f"{who} cannot leave the machine's network")
