"""How a run of the command line ends: errors as one block on standard error, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import click

from paddock.errors import OptionError, PaddockError

HELP_SHOWN: type[click.UsageError] | tuple[()] = getattr(
    click.exceptions, "NoArgsIsHelpError", ()
)  # since click 8.2: a group without a command
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def guarded(run: Callable[[], int], *, debug: bool) -> int:
    """Return the exit code of `run`, having said in one block what went wrong; with `debug`, after its traceback."""
    try:
        code = run()
        sys.stdout.flush()
    except (KeyboardInterrupt, click.exceptions.Abort) as error:
        return FAILED if isinstance(error.__cause__, EOFError) else INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return FAILED
    except click.ClickException as error:
        if isinstance(error, HELP_SHOWN):
            click.echo(error.format_message(), err=True)
            return error.exit_code
        _show(_of_click(error), error if debug else None)
        return error.exit_code
    except PaddockError as error:
        _show(error, error if debug else None)
        return USAGE if isinstance(error, OptionError) else FAILED
    except Exception as error:  # the last line of defence: a bug in Paddock or in a plugin
        _show(_of_bug(error), error if debug else None)
        return FAILED
    return code


def _of_click(error: click.ClickException) -> PaddockError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return PaddockError(error.format_message(), fix=f"see `{context.command_path} --help`" if context else "")


def _of_bug(error: Exception) -> PaddockError:
    what = "".join(traceback.format_exception_only(error)).strip()
    return PaddockError(f"unexpected {what}", fix="this is a bug in Paddock or in a plugin; add --debug to see where")


def _show(error: PaddockError, raised: BaseException | None) -> None:
    if raised is not None:
        traceback.print_exception(raised)
    label = click.style("error:", fg="red", bold=True)
    fix = f"\n  {click.style('fix:', fg='green')} {error.fix}" if error.fix else ""
    click.echo(f"{label} {error.message}{fix}", err=True)


def _drop_output() -> None:
    """Let the interpreter flush into nothing at exit: the reader of our output has gone."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # standard output is no file, as in a test
        return
