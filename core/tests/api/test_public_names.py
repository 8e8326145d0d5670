"""What `import paddock` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import paddock

NAMES = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "EngineConfig",
    "KernelError",
    "Logprob",
    "ModelConfigError",
    "OptionError",
    "PaddockError",
    "PlanError",
    "PluginError",
    "QualityError",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Timings",
    "__version__",
]


def test_the_public_names_are_frozen() -> None:
    """A name added or removed is a decision, made here too."""
    assert paddock.__all__ == NAMES
    assert set(NAMES) <= set(dir(paddock))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_loads(name: str) -> None:
    """Each name is there, and is the class of that name."""
    value = getattr(paddock, name)
    assert value.__name__ == name if name != "__version__" else value.count(".") == 2


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt import fails as it does for any module."""
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = paddock.LMM  # type: ignore[attr-defined]


def test_importing_costs_nothing() -> None:
    """A fresh `import paddock` takes under a tenth of a second, the best of a few times; importing LLM loads no torch."""
    assert min(_import_seconds() for _ in range(3)) < 0.1


def _import_seconds() -> float:
    code = """
import sys, time
began = time.process_time()
import paddock
took = time.process_time() - began
from paddock import LLM, SamplingParams
assert not {"torch", "numpy", "jinja2", "rich", "tokenizers"} & set(sys.modules), "heavy modules are loaded"
print(took)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)
