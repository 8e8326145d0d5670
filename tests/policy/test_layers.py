"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tests.policy.source_tree import DISTRIBUTIONS, ROOT


def test_the_core_is_layered_as_the_architecture_says() -> None:
    """import-linter holds every module to imports from below it."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", "pyproject.toml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_distribution_imports_paddock_and_no_plugin() -> None:
    """Plugins meet in the core alone, and the core knows none of them."""
    packages = {next((folder / "src").iterdir()).name: folder for folder in DISTRIBUTIONS}
    strangers = [
        f"{path.relative_to(ROOT)} imports {module}"
        for package, folder in packages.items()
        for path in sorted(folder.rglob("*.py"))
        for module in _imported(path)
        if module in packages.keys() - {package, "paddock"}
    ]
    assert not strangers


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names
