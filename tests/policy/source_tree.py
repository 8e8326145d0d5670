"""What the policy tests look at: the Python files of every distribution and of the tests, parsed."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = tuple(
    ROOT / name for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["paddock"]["workspace"]["distributions"]
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> list[Path]:
    """Return every Python file the distributions ship."""
    return sorted(path for folder in DISTRIBUTIONS for path in (folder / "src").rglob("*.py"))


def suite_files() -> list[Path]:
    """Return every Python file of the tests, of the distributions and of the workspace."""
    folders = (*(folder / "tests" for folder in DISTRIBUTIONS), ROOT / "tests")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    """Yield every function a file defines, methods and inner functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    """Return a function's lines, signature and docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1
