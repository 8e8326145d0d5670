"""The command line as a whole: help, exit codes, and errors as one block."""

from __future__ import annotations

from collections.abc import Callable

import click
import pytest
from core.tests.plugins.made import Site, model_source

from paddock import config
from paddock.cli import main as shell
from paddock.cli.main import main
from paddock.cli.session import Session
from paddock.errors import OptionError, PaddockError
from paddock.plugins import builtin

COMMAND_PLUGIN = """
from paddock.plugins import CommandSpec, hookimpl

@hookimpl
def paddock_commands():
    return [CommandSpec(name="{name}", command="{command}", help="Moo at the user.")]
"""
MOO = """
import click

@click.command()
@click.option("--loud", is_flag=True)
@click.pass_obj
def command(session, loud):
    \"\"\"Moo.\"\"\"
    click.echo(f"moo {loud} {session.strict} {dict(session.prefer)}")
"""


def with_moo(site: Site) -> None:
    """Install a plugin whose command is in a module of its own."""
    site.install("acme", COMMAND_PLUGIN.format(name="moo", command="acme_moo:command"))
    (site.folder / "site" / "acme_moo.py").write_text(MOO)


def running(patch: pytest.MonkeyPatch, run: Callable[[], None]) -> None:
    """Make every command do `run` instead."""
    patch.setattr(shell, "_loaded", lambda provided: click.Command(provided.spec.name, callback=run))


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_options_commands_and_variables(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Asked for or shown for want of a command, it is complete."""
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in (*builtin.COMMANDS, *config.VARIABLES, "--version", "--debug", "--strict", "--prefer"):
        assert word in text


def test_help_lists_the_commands_of_plugins_without_loading_them(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Their static help is enough: the command's own module does not exist."""
    site.install("acme", COMMAND_PLUGIN.format(name="moo", command="no_such_module:command"))
    assert main(["--help"]) == 0
    assert "Moo at the user." in capsys.readouterr().out


def test_help_never_fails(monkeypatch: pytest.MonkeyPatch, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken plugins and wrong variables are a note in it."""
    site.install("bad", "1 / 0")
    assert main(["--help"]) == 0
    assert "`paddock plugins` says why" in capsys.readouterr().out
    monkeypatch.setenv("PADDOCK_PLUGINS", "no-such-plugin")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "generate" in text
    assert "no-such-plugin" in text


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, name and version."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("paddock ")


def test_a_command_of_a_plugin_runs_with_the_session(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """It sees the global options."""
    with_moo(site)
    assert main(["--prefer", "moo=acme", "moo", "--loud"]) == 0
    assert capsys.readouterr().out == "moo True False {'moo': 'acme'}\n"


def test_debug_and_strict_may_follow_the_command(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """They mean the same wherever they stand, but not behind a `--`."""
    with_moo(site)
    assert main(["moo", "--strict", "--debug"]) == 0
    assert capsys.readouterr().out == "moo False True {}\n"
    assert main(["moo", "--", "--strict"]) == 2


BAD_USAGE = {
    "unknown command": (["genrate"], "no command 'genrate'", "did you mean 'generate'?"),
    "command to install": (["serve"], "no command 'serve'", "pip install paddock-serve"),
    "unknown option": (["--stirct"], "--stirct", "paddock --help"),
    "unknown option of a command": (["plugins", "--jsn"], "--jsn", "paddock plugins --help"),
    "unknown kind": (["list", "modles"], "'modles' is not one of", "paddock list --help"),
    "preference without an owner": (["--prefer", "cow", "plugins"], "--prefer is 'cow'", "NAME=OWNER"),
    "two owners preferred": (["--prefer", "a=b", "--prefer", "a=c", "plugins"], "'a' to 'b' and to 'c'", "choose one"),
    "preference for nothing": (["--prefer", "cwo=x", "plugins"], "'cwo', which no plugin brings", "known:"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_wrong_usage_exits_with_2_and_one_block(capsys: pytest.CaptureFixture[str], site: Site, case: str) -> None:
    """Nothing on standard output; the value and the way out on standard error."""
    arguments, message, fix = BAD_USAGE[case]
    assert site.path
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert f"fix: {fix}" in shown.err or fix in shown.err.partition("fix: ")[2]
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("variable", "value", "exit_code"), [("PADDOCK_PLUGIN", "x", 2), ("PADDOCK_LOG", "loud", 2), ("PADDOCK_PLUGINS", "xyz", 1)]
)
def test_a_wrong_variable_is_an_error_of_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, exit_code: int
) -> None:
    """It is named with its value's way out."""
    monkeypatch.setenv(variable, value)
    assert main(["plugins"]) == exit_code
    error = capsys.readouterr().err
    assert variable in error
    assert "fix: " in error


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is, not as an error."""
    main(["bench"])
    shown = capsys.readouterr()
    assert (shown.out + shown.err).startswith("Usage: paddock bench")


def test_an_error_of_paddock_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Message, then fix."""

    def fail() -> None:
        raise PaddockError("the barn is full", fix="build another")

    running(monkeypatch, fail)
    assert main(["generate"]) == 1
    assert capsys.readouterr().err == "error: the barn is full\n  fix: build another\n"


def test_a_wrong_option_value_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """OptionError is wrong usage wherever it is raised."""

    def fail() -> None:
        raise OptionError("dtype is 'bf15'")

    running(monkeypatch, fail)
    assert main(["generate"]) == 2


def test_a_bug_is_one_block(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback unless asked for."""
    running(monkeypatch, lambda: [].pop())
    assert main(["generate"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: unexpected IndexError: pop from empty list\n  fix: ")
    assert "--debug" in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback_before_the_block(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The block still comes last."""
    running(monkeypatch, lambda: [].pop())
    assert main(["generate", "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "error: unexpected IndexError" in error.splitlines()[-2]


def test_an_interrupt_exits_quietly_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is no error."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    running(monkeypatch, interrupt)
    assert main(["generate"]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_command_may_choose_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through click, never through what it returns."""
    running(monkeypatch, lambda: click.get_current_context().exit(1))
    assert main(["generate"]) == 1
    running(monkeypatch, lambda: 7)  # type: ignore[arg-type]
    assert main(["generate"]) == 0


BAD_COMMANDS = {
    "does not import": ("no_such_module:command", "No module named 'no_such_module'"),
    "is not there": ("json:command", "no attribute 'command'"),
    "is no command": ("json:dumps", "is function"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_command_that_does_not_load_names_its_plugin(site: Site, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """The other commands run as before."""
    reference, reason = BAD_COMMANDS[case]
    site.install("acme", COMMAND_PLUGIN.format(name="moo", command=reference), version="2.5")
    assert main(["moo"]) == 1
    error = capsys.readouterr().err
    assert "command 'moo' of acme 2.5 (plugin 'acme')" in error
    assert reason in error
    assert main(["plugins"]) == 0


def test_a_command_two_plugins_own_is_an_error_until_one_is_preferred(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """The fix it prints works."""
    with_moo(site)
    site.install("zoo", COMMAND_PLUGIN.format(name="moo", command="json:dumps"))
    assert main(["moo"]) == 1
    assert "`paddock --prefer moo=acme ...`" in capsys.readouterr().err
    assert main(["--prefer", "moo=acme", "moo"]) == 0


def test_an_unknown_command_quotes_broken_plugins(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them may have brought it."""
    site.install("bad", "1 / 0")
    assert main(["moo"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_strict_stops_a_command_when_a_plugin_is_broken(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the command runs."""
    with_moo(site)
    site.install("bad", "1 / 0")
    assert main(["moo"]) == 0
    assert main(["moo", "--strict"]) == 1
    assert "1 plugin is broken" in capsys.readouterr().err


def test_a_session_collects_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question after the first is answered from the same registry."""
    session = Session(environment=config.Environment())
    assert session.registry() is session.registry()


def test_a_plugin_may_replace_no_command_by_being_installed(site: Site) -> None:
    """A model plugin beside it changes nothing about commands."""
    site.install("acme", model_source("Cow"))
    assert main(["plugins", "--json"]) == 0
