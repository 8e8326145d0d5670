"""The command line: a group whose commands come from plugins and load when they run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from paddock import log
from paddock.cli.errors import OK, guarded
from paddock.cli.session import Session, parse_owners
from paddock.config import VARIABLES, read_environment
from paddock.errors import OptionError, PaddockError, PluginError
from paddock.plugins import CommandSpec, builtin, resolve
from paddock.plugins.discovery import CORE
from paddock.plugins.kinds import COMMANDS
from paddock.plugins.provider import Provided

ANYWHERE = ("--debug", "--strict")  # understood after the command too, whatever the command
QUIET = ("plugins", "list")  # log nothing, and must not pay for importing structlog


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of `paddock` run with `arguments` (the process's own when None).

    0: done; 1: failed; 2: wrong usage; 130: interrupted.
    """
    words = _hoisted(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: int(cli.main(words, prog_name="paddock", standalone_mode=False)), debug="--debug" in words[:2])


def _hoisted(words: Sequence[str]) -> list[str]:
    """Return the words with those options first that may stand anywhere before a `--`."""
    end = words.index("--") if "--" in words else len(words)
    first = [option for option in ANYWHERE if option in words[:end]]
    return [*first, *(word for word in words[:end] if word not in ANYWHERE), *words[end:]]


class PluginGroup(click.Group):
    """A click group that asks the registry for its commands."""

    def invoke(self, ctx: click.Context) -> int:
        """Run the command; return 0, or leave by an exception."""
        ctx.obj = _open_session(ctx)
        super().invoke(ctx)
        return OK

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the name of every command, those of plugins included."""
        return [name for name, _ in _help_lines(ctx)[0]]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the loaded command; for an unknown one raise OptionError with the nearest name, or what to install."""
        registry = (ctx.find_object(Session) or _open_session(ctx)).registry()
        known = {*(each.spec.name for each in registry.commands), *(each.name for each in registry.conflicts)}
        if cmd_name in known:
            return _loaded(registry.command(cmd_name))
        if ctx.resilient_parsing:  # the shell completes a line that is not finished
            return None
        broken = "".join(f"\n  broken: {each}" for each in registry.broken)
        raise OptionError(f"no command {cmd_name!r}{broken}", fix=registry.missing(COMMANDS, cmd_name).fix)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their static help, without loading any, and the environment variables."""
        commands, note = _help_lines(ctx)
        with formatter.section("Commands"):
            formatter.write_dl(commands)
        if note:
            formatter.write_paragraph()
            formatter.write_text(note)
        with formatter.section("Environment"):
            formatter.write_dl(list(VARIABLES.items()))


@click.group(cls=PluginGroup, name="paddock", invoke_without_command=True)
@click.option("--prefer", multiple=True, metavar="NAME=OWNER", help="Take NAME, which two plugins bring, from OWNER.")
@click.option("--strict", is_flag=True, help="Make a broken plugin, or a warning in the plan, an error.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name=CORE, message="%(package)s %(version)s")
@click.pass_context
def cli(context: click.Context, prefer: tuple[str, ...], strict: bool, debug: bool) -> None:
    """Run large language models, composed from what is installed."""
    session: Session = context.obj
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    if session.strict and context.invoked_subcommand not in QUIET:
        session.registry().require_unbroken()
    if context.invoked_subcommand not in QUIET:
        log.configure(session.environment.log_level)


def _open_session(context: click.Context) -> Session:
    environment = read_environment()
    strict = bool(context.params.get("strict")) or environment.strict
    return Session(environment=environment, strict=strict, prefer=parse_owners("--prefer", context.params.get("prefer", ())))


def _help_lines(context: click.Context) -> tuple[list[tuple[str, str]], str]:
    """Return (name, help) of every command, and a note where plugins are broken: help itself never fails."""
    try:
        registry = (context.find_object(Session) or _open_session(context)).registry()
    except PaddockError as error:
        return list(builtin.COMMANDS.items()), f"Commands of plugins are not shown: {error.message}."
    lines = dict(builtin.COMMANDS) | {each.spec.name: each.spec.help for each in registry.commands}
    note = "Some plugins are broken: `paddock plugins` says why." if registry.broken or registry.conflicts else ""
    return list(lines.items()), note


def _loaded(provided: Provided[CommandSpec]) -> click.Command:
    name, provider = provided.spec.name, provided.provider
    try:
        command = resolve(provided.spec.command)
    except PluginError as error:
        raise PluginError(f"command {name!r} of {provider} does not load: {error.message}", fix=error.fix) from error
    if not isinstance(command, click.Command):
        raise PluginError(f"command {name!r} of {provider} is {type(command).__name__}", fix="make it a click command")
    return command
