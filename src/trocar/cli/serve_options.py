"""The options of `trocar serve`: what an operator may say on the command line, and how it reads in the help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogLevel(StrEnum):
    """How much of the server's own doings goes to stderr; prompts and results never do."""

    error = "error"
    warning = "warning"
    info = "info"


class Isolation(StrEnum):
    """Whether models run in the server's own process, or in one that can say nothing but what was declared."""

    process = "process"
    host = "host"


class Network(StrEnum):
    """Whether the process that runs the models may be in a network."""

    closed = "closed"
    allowed = "allowed"


Models = Annotated[list[str], typer.Option(metavar="NAME", help="Model to serve; repeat it for several.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Torch threads; torch's choice by default.")]
StepTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens in one forward pass (256): fewer answer sooner, more take less time each."
    ),
]
KvGib = Annotated[
    float | None, typer.Option(min=0.01, help="Memory for keys and values of each model, in GiB (2).")
]
TenantGib = Annotated[float, typer.Option(min=0.001, help="What one tenant may keep in the store, in GiB.")]
Isolated = Annotated[
    Isolation, typer.Option(help="One process; or three: HTTP, the gate with the books, the models.")
]
Networked = Annotated[
    Network | None,
    typer.Option(
        help="With isolation host: `allowed` also serves secret weights where the worker cannot leave the machine's "
        "network, `closed` serves nothing there. By default open weights are served there, and secret ones are not."
    ),
]
Level = Annotated[LogLevel, typer.Option(help="What goes to stderr.")]
SaveKey = Annotated[bool, typer.Option("--save-key", help="Write address and key to the SDK's config file.")]
ReadyFile = Annotated[Path | None, typer.Option(help="Write {url, pid} there when the server answers.")]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy", envvar="TROCAR_POLICY",
        help="Policy as TOML; policy.toml in the data folder by default, else the defaults. Read again at SIGHUP.",
    ),
]  # fmt: skip
