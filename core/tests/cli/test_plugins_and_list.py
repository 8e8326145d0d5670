"""`paddock plugins` and `paddock list`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from core.tests.plugins.made import Site, model_source

from paddock.cli import tables
from paddock.cli.list import LISTED
from paddock.cli.main import main
from paddock.plugins import builtin


@pytest.fixture
def zoo(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Return a site with a whole, a broken, a filtered, a rival and a shadowed plugin, and no others."""
    site.install("acme", model_source("Cow", "Calf"), version="1.2")
    site.install("rival", model_source("Cow"))
    site.install("bad", "1 / 0", version="0.9")
    site.install("quiet", "1 / 0")
    site.install("acme", model_source("Cow"), version="1.1", at="later")
    monkeypatch.setenv("PADDOCK_PLUGINS", "acme,rival,bad")
    return site


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Return the JSON a command prints."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plugins_as_json_say_all_there_is_to_know(zoo: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Status, contributions, reasons, conflicts and shadowed copies."""
    report = printed(capsys, "plugins")
    rows = {row["plugin"]: row for row in report["plugins"]}
    assert rows["acme"]["status"] == "ok"
    assert rows["acme"]["version"] == "1.2"
    assert rows["acme"]["provides"] == {"models": ["Cow", "Calf"]}
    assert rows["bad"]["status"] == "broken"
    assert "ZeroDivisionError" in rows["bad"]["error"]
    assert rows["bad"]["fix"]
    assert rows["quiet"]["status"] == "filtered"
    assert rows["builtin"]["provides"]["commands"] == list(builtin.COMMANDS)
    assert [(each["kind"], each["name"]) for each in report["conflicts"]] == [("architecture", "Cow")]
    assert report["shadowed"] == ["acme 1.1 (plugin 'acme')"]


def test_plugins_as_text_say_the_same(zoo: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, then what needs attention."""
    assert main(["plugins"]) == 0
    text = capsys.readouterr().out
    for words in ("acme 1.2", "filtered", "broken: bad", "ZeroDivisionError", "conflict: architecture 'Cow'", "shadowed: "):
        assert words in text


def test_preferred_names_are_shown(zoo: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """What a preference took from whom is on record."""
    report = printed(capsys, "--prefer", "Cow=rival", "plugins")
    assert not report["conflicts"]
    (taken,) = report["overridden"]
    assert (taken["name"], taken["preferred"]) == ("Cow", "rival 1.0 (plugin 'rival')")
    assert main(["--prefer", "Cow=rival", "plugins"]) == 0
    assert "preferred: architecture 'Cow' from rival" in capsys.readouterr().out


@pytest.mark.parametrize(("variable", "arguments"), [("0", ["plugins", "--strict"]), ("1", ["plugins"])])
def test_strict_plugins_show_the_table_and_then_fail(
    zoo: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, arguments: list[str]
) -> None:
    """The reason to look is often that something is broken."""
    monkeypatch.setenv("PADDOCK_STRICT", variable)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "acme 1.2" in shown.out
    assert "bad 0.9" in shown.err


def test_models_are_listed_by_architecture(zoo: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """With who brings them; a conflict is said on standard error."""
    assert main(["list", "models"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[:4] for line in shown.out.splitlines()[1:]] == [
        ["Cow", "acme", "acme", "1.2"],
        ["Calf", "acme", "acme", "1.2"],
        ["Cow", "rival", "rival", "1.0"],
    ]
    assert "conflict: architecture 'Cow' has 2 owners" in shown.err


@pytest.mark.parametrize("kind", LISTED)
def test_every_kind_is_listed_as_json(zoo: Site, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """An array of descriptors, each with its provider."""
    for row in printed(capsys, "list", kind):
        assert {"plugin", "distribution", "version"} <= row.keys()


def test_a_descriptor_is_listed_whole(zoo: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Sets come as sorted arrays."""
    (row,) = printed(capsys, "list", "attention")
    assert (row["name"], row["distribution"], row["devices"]) == ("torch", "paddock", ["cpu", "cuda"])
    assert row["page_sizes"] == [16, 32, 64, 128]


def test_nothing_of_a_kind_is_said_and_is_no_error(zoo: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Text says so on standard error; JSON is an empty array."""
    assert main(["list", "parallel"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no plugin brings any parallel strategy" in shown.err
    assert printed(capsys, "list", "parallel") == []


def test_a_table_on_a_terminal_shows_every_cell_as_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets are text, not markup."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    tables.show_table(("name", "summary"), [("cow", "says [moo]"), ("calf", "")])
    text = capsys.readouterr().out
    assert "says [moo]" in text
    assert "calf" in text
