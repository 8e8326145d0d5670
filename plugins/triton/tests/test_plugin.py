"""What the plugin declares is what it brings."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from paddock.execution import sampling_reference
from paddock.execution.sampling_ops import SAMPLING_OP_NAMES
from paddock.layers import OP_NAMES, reference
from paddock.plugins import resolve
from paddock_triton import plugin


def test_every_op_of_the_core_is_implemented_once() -> None:
    """No op falls back to plain torch on a GPU that serves."""
    assert sorted(spec.op for spec in plugin.paddock_ops()) == sorted(OP_NAMES | SAMPLING_OP_NAMES)


def test_an_op_is_called_as_its_twin_is() -> None:
    """Implementations have their twins' parameters, by name, order and default."""
    pytest.importorskip("triton")
    for spec in plugin.paddock_ops():
        defined = sampling_reference if spec.op in SAMPLING_OP_NAMES else reference
        found, twin = inspect.signature(resolve(spec.implementation)), inspect.signature(getattr(defined, spec.op))
        assert [(p.name, p.default) for p in found.parameters.values()] == [(p.name, p.default) for p in twin.parameters.values()]


def test_the_plugin_is_declared_without_torch_or_triton() -> None:
    """Planning, which reads the descriptors, stays quick."""
    code = "import paddock_triton.plugin as p, sys; p.paddock_ops(); sys.exit(any(m in sys.modules for m in ('torch', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
