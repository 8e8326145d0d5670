"""Before any test: what must be said to Triton before anything imports it, and where the tools are that formats are held to.

Where there is no GPU its kernels run in its interpreter, and Triton's own library decides that as it is imported, which
transformers does too. The tools are in `.tools` once `make tools` has put them there; .venv goes before it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from paddock.planning.hardware import gpu_device_files_exist

if not gpu_device_files_exist():
    os.environ.setdefault("TRITON_INTERPRET", "1")
_TOOLS = Path(__file__).parent / ".tools"
if _TOOLS.is_dir() and str(_TOOLS) not in sys.path:
    sys.path.append(str(_TOOLS))
# Files of few tests that take long. Workers take a file at a time, so these come first: none is begun when the others end.
_LONG = (
    *("test_smollm2.py", "test_ops_filter.py", "test_awq_quality.py", "test_compiler_processes.py", "test_disk_startup.py"),
    *("test_compilation.py", "test_compiled_products.py", "test_awq.py", "test_compile_ahead.py", "test_kernel_variants.py"),
    *("test_generation.py", "test_memory.py", "test_recipe_ratio.py", "test_running.py", "test_attention_steps.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, as they are listed; all others stay as they are collected."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(_LONG)))
