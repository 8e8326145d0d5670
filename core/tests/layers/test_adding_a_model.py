"""The page about adding a model: its plugin runs, and keeps the contracts."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "adding-a-model.md").read_text()
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write the page's files into an empty folder that Python imports from, and forget them afterwards."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "stacked" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "stacked"]:
        del sys.modules[name]


def test_the_pages_plugin_generates_tokens(written: Path) -> None:
    """The plugin of the page answers two prompts with random weights."""
    runpy.run_path(str(written / "try_it.py"))


def test_the_pages_test_file_passes(written: Path) -> None:
    """The plugin of the page keeps every model contract, on two ranks and two stages too."""
    runpy.run_path(str(written / "test_stacked.py"))["test_stacked_keeps_the_model_contracts"]()


def test_the_pages_plugin_stays_at_about_fifty_lines() -> None:
    """What a newcomer has to write stays small, imports and hook included."""
    lines = [line for name in ("stacked/plugin.py", "stacked/model.py") for line in FILES[name].splitlines() if line.strip()]
    assert len(lines) <= 55
