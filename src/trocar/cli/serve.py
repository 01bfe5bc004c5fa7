"""`trocar serve`: from models on this machine and a data folder to a server that answers.

Whatever can be refused is refused before a model is loaded. The key of a new ledger is made last, right
before it is printed, so a failed start never loses a secret.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from trocar import errors
from trocar.cli import serve_options as options
from trocar.cli.access import Access, access, open_gate, print_access, saved_secret
from trocar.cli.audit import AnchorsOption
from trocar.cli.folder import DataOption, Folder
from trocar.cli.logs import log_to_stderr
from trocar.cli.plan import Plan, Sizes
from trocar.cli.serve_options import Isolation, LogLevel, Network

if TYPE_CHECKING:
    from trocar.cli.address import Address
    from trocar.gate.gate import Gate
    from trocar.service.compose import Assembly

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
DEFAULT_PORT: Final = 8765
ISOLATION: Final = {
    "process": "isolation: process. Programs are data and cannot run code; but all tenants share this process, so "
    "nothing protects one from another's load, from timing, or from a fault in it.",
    "host": "isolation: host. The models run in a process of their own, which can hand the gate nothing but declared "
    "arrays; tenants share that process. It runs as the same user: docs/security.md says what that leaves open.",
}


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
    isolation: options.Isolated = Isolation.process,
    network: options.Networked = None,
    log_level: options.Level = LogLevel.warning,
    save_key: options.SaveKey = False,
    ready_file: options.ReadyFile = None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C."""
    from trocar.cli.address import NO_TLS, bind, is_loopback, write_ready

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Folder.at(data)
    _require_separate(network, isolation)
    _require_models(model)
    folder.make()
    log_to_stderr(log_level)
    if not is_loopback(host):
        print(NO_TLS.format(host=host), file=sys.stderr)
    with ExitStack() as stack:
        address = bind(host, port)
        stack.callback(address.socket.close)
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
            stack.callback(ready_file.unlink, missing_ok=True)
        sizes = Sizes(threads, step_tokens, kv_gib, tenant_gib)
        plan = Plan(tuple(model), folder, policy, anchors, sizes, log_level, save_key, network)

        def on_ready() -> None:
            if ready_file is not None:
                write_ready(ready_file, address.url)
            print(f"trocar ready {address.url}", flush=True)

        serve_it = _in_three if isolation is Isolation.host else _in_one
        serve_it(plan, address, on_ready, stack)


Ready = Callable[[], None]


def _in_three(plan: Plan, address: Address, on_ready: Ready, _stack: ExitStack) -> None:
    from trocar.cli.processes import serve_in_three

    plan.rules.read()  # what is wrong with the file is said before three processes say it
    network = _network(plan)
    print(f"loading {', '.join(plan.models)} ...\n{ISOLATION['host']}", flush=True)
    serve_in_three(plan, address, on_ready, network)


def _network(plan: Plan) -> Network:
    """Whether the worker will have no network; refuses what the operator did not allow, before anything is loaded."""
    from trocar.cli.worker import network_open
    from trocar.host.worker import cell

    if cell.can_close_network():
        return Network.closed
    secret = _secret(plan.models)
    if plan.network is Network.closed:
        raise network_open("a worker")
    if secret and plan.network is None:
        raise network_open(f"a worker with {secret[0]!r}, whose weights are secret,")
    return Network.allowed


def _require_separate(network: Network | None, isolation: Isolation) -> None:
    if network is not None and isolation is Isolation.process:
        reason = "in one process the models are in the machine's network, always"
        raise errors.refuse("bad_argument", "--network", reason, next_step="Add --isolation host.")


def _secret(names: Sequence[str]) -> list[str]:
    from trocar.models.pull import locate

    return [name for name in names if not locate(name)[1].open_weights]


def _in_one(plan: Plan, address: Address, on_ready: Ready, stack: ExitStack) -> None:
    _require_one_is_enough(plan)
    gate = open_gate(plan.folder, plan.rules, plan.anchors or plan.folder.anchors, stack)
    secret = saved_secret(gate) if plan.save_key else None
    assembly = _load(plan.models, plan.folder, gate, plan.sizes)
    from trocar.api.app import create_app
    from trocar.cli.serving import HttpServer, Served
    from trocar.service.compose import spare_collector

    service = assembly.service
    served = Served(
        create_app(service),
        assembly.halt,
        service.close,
        lambda: _reload(plan, gate),
        spare_collector,
    )
    server = HttpServer(served, plan.log_level, on_ready)
    _print_start(assembly, address.url, access(gate, address.url, secret, plan.save_key))
    server.serve_until_stopped(address)


def _reload(plan: Plan, gate: Gate) -> None:
    """Takes the policy as it is now, unless one process is not enough for it any more."""
    policy = plan.rules.read()
    secret = _secret(plan.models)
    if policy.settings.isolation == "host" and secret:
        raise errors.refuse(
            "limit_changed",
            "settings.isolation",
            f"{secret[0]!r} is secret and runs in this one process, which no policy can change",
            next_step="Start the server anew with --isolation host.",
        )
    gate.change_policy(policy)


def _require_one_is_enough(plan: Plan) -> None:
    """Refuses secret weights in one process where the policy asks for three."""
    if plan.rules.read().settings.isolation == "process":
        return
    secret = _secret(plan.models)
    if secret:
        raise errors.refuse(
            "bad_argument",
            "isolation",
            f"the policy serves secret weights with isolation 'host' only, and {secret[0]!r} is such a model",
            next_step="Add --isolation host.",
        )


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


def _load(names: Sequence[str], folder: Folder, gate: Gate, sizes: Sizes) -> Assembly:
    print(f"loading {', '.join(names)} ...", flush=True)
    from trocar.service.compose import assemble

    return assemble(
        names,
        folder.store,
        gate,
        threads=sizes.threads,
        step_tokens=sizes.step_tokens,
        kv_bytes=sizes.kv_bytes,
        tenant_bytes=sizes.tenant_bytes,
    )


def _print_start(assembly: Assembly, url: str, found: Access) -> None:
    for model, took_s in zip(assembly.models, assembly.validation_s, strict=True):
        print(f"model {model.facts.name}: {len(model.facts.sites)} sites validated in {took_s:.1f} s")
        for site, reason in model.facts.unavailable.items():
            print(f"  not served: {site}: {reason}")
    print(ISOLATION["process"])
    print_access(found, url, assembly.models[0].facts.name)
