"""`trocar serve`: from models on this machine and a data folder to a server that answers.

Whatever can be refused is refused before a model is loaded. The key of a new ledger is made last, right
before it is printed, so a failed start never loses a secret.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trocar import errors
from trocar.cli import serve_options as options
from trocar.cli.audit import AnchorsOption
from trocar.cli.folder import DataOption, Folder
from trocar.cli.serve_options import LogLevel

if TYPE_CHECKING:
    from trocar.gate.gate import Gate
    from trocar.gate.policy import Policy
    from trocar.service.compose import Assembly

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
DEFAULT_PORT: Final = 8765
ISOLATION: Final = (
    "isolation: process. Programs are data and cannot run code; but all tenants share this process, so "
    "nothing protects one from another's load, from timing, or from a fault in it."
)
NO_TLS: Final = (
    "warning: there is no TLS on {host}: keys and results can be read on the way. Put a TLS proxy in front."
)


@dataclass(frozen=True, slots=True)
class Access:
    """How a user gets in: the sentences to print, and whether the SDK finds address and key by itself."""

    lines: tuple[str, ...]
    sdk_knows: bool


def serve(
    model: options.Models = [DEFAULT_MODEL],  # noqa: B006 - typer copies it
    host: options.Host = "127.0.0.1",
    port: options.Port = DEFAULT_PORT,
    data: DataOption = None,
    policy: options.PolicyFile = None,
    anchors: AnchorsOption = None,
    threads: options.Threads = None,
    step_tokens: options.StepTokens = None,
    kv_gib: options.KvGib = None,
    tenant_gib: options.TenantGib = 64.0,
    log_level: options.Level = LogLevel.warning,
    save_key: options.SaveKey = False,
    ready_file: options.ReadyFile = None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C."""
    from trocar.cli.address import bind, is_loopback, write_ready

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Folder.at(data)
    _require_models(model)
    folder.make()
    _log_to_stderr(log_level)
    if not is_loopback(host):
        print(NO_TLS.format(host=host), file=sys.stderr)
    with ExitStack() as stack:
        address = bind(host, port)
        stack.callback(address.socket.close)
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
            stack.callback(ready_file.unlink, missing_ok=True)
        rules = Rulebook(policy or folder.policy, named=policy is not None)
        gate = _open_gate(folder, rules, anchors or folder.anchors, stack)
        secret = _saved_secret(gate) if save_key else None

        def on_ready() -> None:
            if ready_file is not None:
                write_ready(ready_file, address.url)
            print(f"trocar ready {address.url}", flush=True)

        assembly = _load(model, folder, gate, Sizes(threads, step_tokens, kv_gib, tenant_gib))
        from trocar.cli.serving import HttpServer

        server = HttpServer(assembly, log_level, on_ready, lambda: gate.change_policy(rules.read()))
        _print_start(assembly, address.url, _access(gate, address.url, secret, save_key))
        server.serve_until_stopped(address)


def _require_models(names: Sequence[str]) -> None:
    """Refuses a model that is named twice or is not on this machine, before torch is imported."""
    from trocar.models.pull import locate

    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise errors.refuse(
            "bad_argument", "model", f"{twice[0]!r} is named twice", next_step="Name it once."
        )
    served = Counter(locate(name)[1].name for name in names)
    same = [name for name, count in served.items() if count > 1]
    if same:
        reason = f"two of the models would both be served as {same[0]!r}"
        raise errors.refuse("bad_argument", "model", reason, next_step="Serve them from two processes.")


@dataclass(frozen=True, slots=True)
class Rulebook:
    """The policy file of a server.

    Attributes:
        named: whether the operator named it; one that only might be there may be absent.
    """

    path: Path
    named: bool

    def read(self) -> Policy:
        from trocar.cli.policy import read_file
        from trocar.gate.policy import Policy

        return read_file(self.path) if self.named or self.path.exists() else Policy()


def _open_gate(folder: Folder, rules: Rulebook, anchors: Path, stack: ExitStack) -> Gate:
    from trocar.gate.gate import Gate

    gate = Gate(folder.ledger_url, rules.read(), anchors=anchors, secrets=folder.root)
    stack.callback(gate.close)
    return gate


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an operator may set about engines; None for the default."""

    threads: int | None
    step_tokens: int | None
    kv_gib: float | None
    tenant_gib: float


def _load(names: Sequence[str], folder: Folder, gate: Gate, sizes: Sizes) -> Assembly:
    print(f"loading {', '.join(names)} ...", flush=True)
    from trocar.service.compose import assemble

    kv_bytes = None if sizes.kv_gib is None else int(sizes.kv_gib * (1 << 30))
    return assemble(
        names,
        folder.store,
        gate,
        threads=sizes.threads,
        step_tokens=sizes.step_tokens,
        kv_bytes=kv_bytes,
        tenant_bytes=int(sizes.tenant_gib * (1 << 30)),
    )


def _saved_secret(gate: Gate) -> str | None:
    """The key in the SDK's config file if it is one of this ledger's; None when the ledger has no key yet.

    Raises:
        ClientError: `bad_argument` when there are keys but their secrets are not at hand.
    """
    from trocar.cli import saved

    found = saved.read().get("api_key")
    if not gate.keys.list():
        return None
    try:
        gate.keys.authenticate(found if isinstance(found, str) else None)
    except errors.AuthError:
        raise errors.refuse(
            "bad_argument",
            "save-key",
            "this ledger has keys, no secret can be read again, and the SDK's config holds none of them",
            next_step="Leave --save-key out and set TROCAR_API_KEY; `trocar key create` makes another key.",
        ) from None
    return str(found)


def _access(gate: Gate, url: str, secret: str | None, save_key: bool) -> Access:
    """Makes the first key of a new ledger, saves what is to be saved, and says how to get in."""
    from trocar.cli import saved
    from trocar.gate.policy import Role, Tier

    if secret is not None:
        outcome = saved.save(url, secret, replace=True)
        return Access((outcome.said,), outcome.written)
    count = len(gate.keys.list())
    if count:
        known = saved.read().get("url") == url
        return Access((f"keys: {count} in the ledger; `trocar key create` makes another",), known)
    made = gate.keys.create("local", Tier.open, Role.operator, "made by the first start").secret
    lines = [f"operator key of tenant 'local', shown once:  export TROCAR_API_KEY={made}"]
    written = False
    if save_key or sys.stdout.isatty():
        outcome = saved.save(url, made, replace=save_key)
        written = outcome.written
        lines.append(outcome.said)
    return Access(tuple(lines), written)


def _print_start(assembly: Assembly, url: str, access: Access) -> None:
    for model, took_s in zip(assembly.models, assembly.validation_s, strict=True):
        print(f"model {model.facts.name}: {len(model.facts.sites)} sites validated in {took_s:.1f} s")
        for site, reason in model.facts.unavailable.items():
            print(f"  not served: {site}: {reason}")
    name = assembly.models[0].facts.name
    client = "trocar.Client()" if access.sdk_knows else f"trocar.Client({url!r})"
    snippet = (
        "import trocar",
        f"model = {client}.model({name!r})",
        'print(model.generate("The capital of France is", max_new_tokens=8))',
    )
    print("\n".join((ISOLATION, *access.lines, f"API reference: {url}/docs", "", *snippet, "")), flush=True)


def _log_to_stderr(level: LogLevel) -> None:
    # only our own and uvicorn's: at INFO, SQLAlchemy would log the values of its statements
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("trocar", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
