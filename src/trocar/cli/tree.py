"""The tree of commands: which noun and verb is which function. The only place that lists them.

Every verb's module is light and imports what it works with when it is called. Help is plain text: it reads the
same in a terminal, a pipe and a log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trocar import __version__, errors
from trocar.cli import airlock, attack, audit, key, ledger, model, policy
from trocar.cli.demonstrate import demo
from trocar.cli.doctor import doctor
from trocar.cli.front import front
from trocar.cli.gate import gate
from trocar.cli.ops import ops
from trocar.cli.serve import serve
from trocar.cli.worker import worker


class Group(TyperGroup):
    """A group that names the closest command when one is misspelt."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands and not word.startswith("-"):
            raise errors.refuse(
                "unknown_command",
                ctx.command_path,
                f"{word[:80]!r} is not a command of `{ctx.command_path}`",
                closest=errors.closest(word, self.commands),
                next_step=f"`{ctx.command_path} --help` lists the commands.",
            )
        return super().resolve_command(ctx, args)


def command() -> Any:
    """The whole tree, as something with click's `main(args, prog_name, standalone_mode)`."""
    root = _app("Interpretability on language models you may never download.")
    root.callback()(_root)
    root.command()(serve)
    for part in (front, gate, worker):
        root.command()(part)
    root.command()(demo)
    _noun(root, "model", "Models on this machine.", model.pull, model.list_, model.show_)
    _noun(
        root,
        "key",
        "API keys: tenants, tiers, roles; and tokens.",
        key.create,
        key.attenuate,
        key.list_,
        key.revoke,
    )
    _noun(
        root,
        "ledger",
        "Budgets, the hash-chained log, and stopping a lineage.",
        ledger.show_,
        ledger.verify,
        ledger.log,
        ledger.freeze,
        ledger.thaw,
    )
    _noun(
        root,
        "policy",
        "The file that says who may learn how much.",
        policy.init,
        policy.check,
        policy.diff,
        policy.explain,
        policy.approve,
    )
    _noun(root, "audit", "Checks of the log, and its anchors.", audit.verify, audit.log, audit.anchor)
    _noun(
        root,
        "airlock",
        "Requests to let rows and artifacts out, and to raise limits.",
        airlock.list_,
        airlock.show_,
        airlock.sign,
        airlock.approve,
        airlock.reject,
        airlock.withdraw,
        airlock.apply,
        airlock.verify,
    )
    _noun(root, "attack", "Attempts to steal weights, made to be stopped.", attack.run)
    root.command()(ops)
    root.command()(doctor)
    return typer.main.get_command(root)


def _app(doc: str) -> typer.Typer:
    return typer.Typer(
        cls=Group, help=doc, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
        pretty_exceptions_enable=False, suggest_commands=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip


def _noun(root: typer.Typer, name: str, doc: str, *verbs: Callable[..., None]) -> None:
    noun = _app(doc)
    for verb in verbs:
        noun.command(verb.__name__.rstrip("_"))(verb)
    root.add_typer(noun, name=name)


def _version(asked: bool) -> None:
    if asked:
        print(f"trocar {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Interpretability on language models you may never download."""
