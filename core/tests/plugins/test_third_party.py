"""A plugin that lives outside the repository: built, installed and removed as its users would, without a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from core.tests.plugins.made import model_source

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "acme-giraffe"
version = "3.1"
dependencies = ["paddock>=0.1,<1"]

[project.entry-points."paddock.plugins.v1"]
giraffe = "acme_giraffe.plugin"
"""


class Scratch:
    """An environment of its own that also sees what the tests run in."""

    def __init__(self, folder: Path) -> None:
        """Make it; nothing is copied."""
        venv.create(folder, symlinks=True)
        self.python = str(folder / "bin" / "python")
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "tested.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def run(self, *words: str) -> str:
        """Return what the environment's Python prints; fail with what it said when it fails."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PADDOCK_", "PYTHON", "PIP_"))}
        result = subprocess.run([self.python, *words], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def pip(self, *words: str) -> None:
        """Install or remove with the pip of the environment the tests run in, offline."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "--quiet", *words]
        subprocess.run(command, check=True, capture_output=True)

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the rows of `paddock list models --json` by model name."""
        return {row["name"]: row for row in json.loads(self.run("-m", "paddock", "list", "models", "--json"))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the source tree of a distribution with one model."""
    package = tmp_path / "giraffe" / "acme_giraffe"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(model_source("GiraffeForCausalLM", name="giraffe"))
    return package.parent


def test_a_third_party_plugin_comes_and_goes_with_its_distribution(tmp_path: Path, source: Path) -> None:
    """Installing it adds its model, removing it takes the model away, and ours stay as they were."""
    scratch = Scratch(tmp_path / "environment")
    before = scratch.models()
    assert "giraffe" not in before

    scratch.pip("install", "--no-index", "--no-deps", "--no-build-isolation", str(source))
    during = scratch.models()
    added = during.pop("giraffe")
    assert added["architectures"] == ["GiraffeForCausalLM"]
    assert (added["plugin"], added["distribution"], added["version"]) == ("giraffe", "acme-giraffe", "3.1")
    assert during == before

    scratch.pip("uninstall", "--yes", "acme-giraffe")
    assert scratch.models() == before


def test_the_model_of_the_documentation_ships_as_the_page_says(tmp_path: Path) -> None:
    """Its files and its pyproject.toml, as printed, install; then it is listed and can be planned for."""
    page = (Path(__file__).parents[3] / "docs" / "adding-a-model.md").read_text()
    for name, text in re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    scratch = Scratch(tmp_path / "environment")
    scratch.pip("install", "--no-index", "--no-deps", "--no-build-isolation", str(tmp_path / "project"))
    assert scratch.models()["stacked"]["architectures"] == ["StackedForCausalLM"]
    (raw,) = re.findall(r"^config = (\{.*?\})$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "config.json").write_text(raw)
    assert json.loads(scratch.run("-m", "paddock", "plan", str(tmp_path), "--json"))["plan"]["model"]["name"] == "stacked"
