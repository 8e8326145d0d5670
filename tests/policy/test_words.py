"""What the tests and the public parts of the code say about themselves."""

from __future__ import annotations

import ast
import re
import tomllib

from tests.policy.source_tree import DISTRIBUTIONS, ROOT, functions, source_files, suite_files

_NO_SUCH_MODULES = {"utils", "helpers", "manager", "common", "misc"}


def test_every_test_says_its_property_in_a_docstring() -> None:
    """A test is named after a property and one sentence says it."""
    silent = [
        f"{path.relative_to(ROOT)}:{function.name}"
        for path in suite_files()
        for function in functions(path)
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert not silent


def test_no_module_is_a_drawer_for_everything() -> None:
    """Names such as utils hide what a module is for."""
    assert not [path for path in source_files() if path.stem in _NO_SUCH_MODULES]


def test_every_todo_names_what_would_end_it() -> None:
    """A TODO reads `TODO(until X): ...`."""
    vague = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in source_files()
        for line in path.read_text().splitlines()
        if "TODO" in line and not re.search(r"TODO\(until [^)]+\)", line)
    ]
    assert not vague


def test_every_dependency_has_a_line_in_the_decisions() -> None:
    """A dependency is a choice, and docs/decisions says why it was made."""
    decisions = "\n".join(path.read_text() for path in (ROOT / "docs/decisions").glob("*.md"))
    wanted = {
        re.split(r"[<>=!\[; ]", requirement)[0]
        for folder in DISTRIBUTIONS
        for requirement in tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    assert not [name for name in sorted(wanted) if not name.startswith("paddock") and f"`{name}`" not in decisions]


def test_files_whose_tests_come_first_are_there() -> None:
    """One that is renamed would silently lose its place."""
    first = set(re.findall(r'"(test_\w+\.py)"', (ROOT / "conftest.py").read_text()))
    assert first
    assert first <= {path.name for path in suite_files()}
