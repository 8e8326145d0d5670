"""How figures are printed."""

from __future__ import annotations

import pytest

from paddock.cli.bench.figures import print_facts, print_figures

DEFINED = {"a": ("speed", "1/s", "things a second"), "b": ("wait", "s", "until one")}


def test_a_rate_stands_beside_its_share_of_the_roof(capsys: pytest.CaptureFixture[str]) -> None:
    """Only rates have one, and only where there is a roof; what is unknown is a dash."""
    print_figures(DEFINED, {"a": 2.0, "b": None}, rates=("a",), share=51.26)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("things a second; 51.3 % of the roof")
    assert second.split() == ["wait", "-", "s", "until", "one"]
    print_figures(DEFINED, {"a": 2.0, "b": None}, rates=("a",), share=None)
    assert "roof" not in capsys.readouterr().out


def test_facts_that_are_not_known_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """None says nothing, alone or among the parts of a fact."""
    print_facts({"gpu": None, "versions": {"x": "1", "y": None}, "commit": "c"})
    assert capsys.readouterr().out == "  versions: x 1\n  commit: c\n"
