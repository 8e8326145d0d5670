"""Looking around is cheap: no torch, and little work."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

LOADED = """
import sys
from paddock.cli.main import main
code = main({arguments!r})
print(*sorted(sys.modules), file=sys.stderr)
sys.exit(code)
"""
HEAVY = {"torch", "numpy", "transformers", "tokenizers", "triton", "rich", "structlog", "huggingface_hub"}
NEEDED = "import attrs, click, importlib.metadata, packaging.requirements, pluggy"
LOOKS = (["--help"], ["--version"], ["plugins", "--json"], ["plugins"], ["list", "models", "--json"], ["list", "ops"])


def clean() -> dict[str, str]:
    """Return the environment without anything of Paddock's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PADDOCK_")}


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_looking_around_imports_nothing_heavy(arguments: list[str]) -> None:
    """A fresh process that lists what is installed never loads torch."""
    command = [sys.executable, "-c", LOADED.format(arguments=arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=clean())
    assert result.returncode == 0, result.stderr
    assert result.stdout
    modules = set(result.stderr.split())
    assert "paddock.cli.main" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("words", [[], ["throughput"], ["latency"], ["startup"], ["kernels"], ["chart"], ["table"]], ids=" ".join)
def test_help_of_a_measurement_needs_no_torch(words: list[str]) -> None:
    """What `paddock bench` offers is known before anything is loaded to measure it."""
    command = [sys.executable, "-c", LOADED.format(arguments=["bench", *words, "--help"])]
    result = subprocess.run(command, capture_output=True, text=True, env=clean())
    assert result.returncode == 0, result.stderr
    assert not {"torch", "triton", "matplotlib"} & set(result.stderr.split())


@pytest.mark.parametrize(("arguments", "most"), [(["--help"], 2.0), (["plugins", "--json"], 2.5), (["list", "models"], 2.5)])
def test_looking_around_takes_little_work(arguments: list[str], most: float) -> None:
    """In processor time, the best of a few runs, beside that of importing the libraries that it cannot do without.

    The two take turns, so that a while in which the machine is slower is neither's alone.
    """
    turns = [(_processor_seconds("-m", "paddock", *arguments), _processor_seconds("-c", NEEDED)) for _ in range(3)]
    spent, needed = map(min, zip(*turns, strict=True))
    assert spent < most * needed


def _processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, env=clean())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
