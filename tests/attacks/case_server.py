"""Run as a program: a real HTTP server, as `trocar serve` makes it, around a tiny random model.

Arguments: a folder. Writes {url, keys, pid} to `ready.json` there when it answers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(folder: Path) -> None:
    import torch

    from conftest import make_server, make_tiny
    from trocar.cli import connections
    from trocar.cli.address import bind
    from trocar.cli.serving import HttpServer, Served
    from trocar.gate.policy import Role, Tier

    torch.set_num_threads(1)
    # the deadlines of a test: what is proven is that they exist
    connections.HEAD_S, connections.BODY_S, connections.SEND_S = 2.0, 3.0, 4.0
    made = make_server(folder, [make_tiny()])
    keys = {
        name: made.service.gate.keys.create(name, Tier.open, Role.researcher).secret
        for name in ("mallory", "victor")
    }
    address = bind("127.0.0.1", 0)

    def ready() -> None:
        partial = folder / "ready.partial"
        partial.write_text(json.dumps({"url": address.url, "keys": keys, "pid": os.getpid()}))
        partial.replace(folder / "ready.json")

    served = Served(made.app, made.service.halt, made.service.close, lambda: None)
    HttpServer(served, "warning", ready).serve_until_stopped(address)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
