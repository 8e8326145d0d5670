"""Hooks are for finding out what is installed; nothing a token touches goes through one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from paddock.assemble import assemble
from paddock.config import EngineConfig
from paddock.plugins import hookimpl, hookspecs
from paddock.request import SamplingParams
from tests.integration.test_answers import CONFIG


def _counting_plugin(calls: Counter[str]) -> Any:
    """Return a plugin that implements every hook, adds nothing, and counts."""

    def collecting(name: str) -> Any:
        def hook(self: object) -> list[object]:
            calls[name] += 1
            return []

        return hook

    def checking(self: object, plan: object) -> list[object]:
        calls["paddock_check_plan"] += 1
        return []

    names = [name for name in vars(hookspecs) if name.startswith("paddock_")]
    hooks = {name: checking if name == "paddock_check_plan" else collecting(name) for name in names}
    for name, hook in hooks.items():
        hook.__name__ = name
    return type("Counting", (), {name: hookimpl(hook) for name, hook in hooks.items()})()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a model folder that is only a config."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_no_hook_is_called_while_tokens_are_made(folder: Path) -> None:
    """Every hook is called while the engine is assembled, and none from the first step to the last."""
    calls: Counter[str] = Counter()
    config = EngineConfig(model=str(folder), load_format="dummy", tokenizer="none", device="cpu")
    engine = assemble(config, plugins=[_counting_plugin(calls)])
    assert set(calls) == {name for name in vars(hookspecs) if name.startswith("paddock_")}
    before = calls.copy()
    for i in range(3):
        engine.add([5, 6, 7 + i], SamplingParams(max_tokens=6, ignore_eos=True, seed=i))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    engine.close()
    assert steps >= 6
    assert calls == before
