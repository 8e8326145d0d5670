"""What the core brings is whole."""

from __future__ import annotations

import subprocess
import sys

import click
from core.tests.plugins.made import given

from paddock.plugins import builtin, resolve


def test_collecting_the_core_imports_no_torch() -> None:
    """Neither torch nor numpy nor transformers is loaded by the host."""
    code = (
        "import sys; from paddock.plugins.host import PluginHost; PluginHost().collect(); "
        "print(sorted({'torch', 'numpy', 'transformers', 'triton', 'rich', 'structlog'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_reference_of_the_core_leads_somewhere() -> None:
    """Commands, ops and the attention backend are there and can be called."""
    registry = given()
    assert all(isinstance(resolve(each.spec.command), click.Command) for each in registry.commands)
    assert all(callable(resolve(each.spec.implementation)) for each in registry.ops)
    assert all(callable(resolve(each.spec.factory)) for each in registry.attention_backends)


def test_the_core_serves_every_op_on_every_device() -> None:
    """The reference is there whatever else is, ranked below everything."""
    registry = given()
    for op in builtin.OPS:
        (reference,) = registry.ops_for(op)
        assert reference.spec.rank == 0
        assert reference.spec.devices == {"cpu", "cuda"}


def test_the_core_s_attention_serves_everything() -> None:
    """Any head size, every dtype, FP8 pages, and each feature a model may need."""
    spec = given().attention("torch").spec
    assert not spec.head_dims
    assert spec.kv_cache_dtypes == {"bfloat16", "float16", "float32", "fp8"}
    assert spec.features == {"alibi", "sliding_window", "softcap"}
