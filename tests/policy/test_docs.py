"""The documents point at what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.policy.source_tree import DISTRIBUTIONS, ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(folder / "README.md" for folder in DISTRIBUTIONS)])
_ROOMS = (ROOT, ROOT / "core/src/paddock")
_BY_NAME_ALONE = re.compile(r"`([a-z_]+\.py)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every link within the repository is to a file or folder that exists."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_passing_exist(page: Path) -> None:
    """A path is one of the repository or of the core's package; a bare name is that of some module."""
    text = page.read_text()
    paths = set(re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|md|toml|txt))`", text))
    assert not [path for path in paths if not any((room / path).exists() for room in _ROOMS)]
    modules = {path.name for folder in DISTRIBUTIONS for path in (folder / "src").rglob("*.py")}
    assert not set(_BY_NAME_ALONE.findall(text)) - modules


def test_every_decision_is_in_the_index() -> None:
    """The index names each file with its title, in order, and no other."""
    folder = ROOT / "docs/decisions"
    expected = []
    for path in sorted(folder.glob("[0-9]*.md")):
        heading = re.match(r"# 0*(\d+)[.:] (.+)\n", path.read_text())
        assert heading, f"{path.name} begins with no `# NUMBER. Title`"
        expected.append((f"{heading[1]}. {heading[2]}", path.name))
    assert re.findall(r"^- \[(.+)\]\((.+)\)$", (folder / "README.md").read_text(), re.MULTILINE) == expected
