"""The page about plugins: every hook is there, and every example works."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
from core.tests.plugins.made import given

from paddock.plugins.collection import HOOKS
from paddock.plugins.kinds import KINDS

PAGE = (Path(__file__).parents[3] / "docs" / "plugins.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^### `(paddock_\w+)`$(.*?)(?=^#)", PAGE, re.MULTILINE | re.DOTALL))


def loaded(block: str) -> types.ModuleType:
    """Return a block as a module, having run it."""
    module = types.ModuleType("example")
    exec(compile(block, "docs/plugins.md", "exec"), vars(module))
    return module


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_example_runs(block: str) -> None:
    """And what it asserts holds."""
    loaded(block)


def test_every_hook_has_a_section_and_no_other_thing_has() -> None:
    """A new hook is documented in the change that adds it."""
    assert sorted(SECTIONS) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_is_a_plugin_that_implements_it(hook: str) -> None:
    """The host takes it whole, and it brings something."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[hook], re.MULTILINE | re.DOTALL)
    module = loaded(block)
    assert hasattr(module, hook)
    with_example, without = given(module), given()
    assert not with_example.broken
    assert any(
        len(getattr(with_example, name)) > len(getattr(without, name)) for name in (*(kind.name for kind in KINDS), "checks")
    )
