"""What is planned for GPUs with the Triton plugin installed, without a GPU: what serves, what falls back, what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from attrs import evolve

from paddock.checkpoint.source import ModelSource
from paddock.config import EngineConfig, Environment
from paddock.errors import PlanError
from paddock.planning.hardware import GIB, Hardware, parse_gpus
from paddock.planning.issues import require_runnable
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins import Issue
from paddock.plugins.host import PluginHost
from tests.integration.test_answers import CONFIG

pytest.importorskip("paddock_llama.plugin")
triton = pytest.importorskip("paddock_triton.plugin")

H200, A100 = parse_gpus("H200"), parse_gpus("A100")
SERVED = {**CONFIG, "head_dim": 64, "torch_dtype": "bfloat16"}


def planned(hardware: Hardware, raw: Any = SERVED, **options: Any) -> Plan:
    """Return the plan of a small Llama with the first-party plugins for Llama and GPUs."""
    registry = PluginHost(environment=Environment(plugins=("llama", "triton"))).collect()
    source = ModelSource(name="small", folder=None, config=raw)  # type: ignore[arg-type]
    return resolve(EngineConfig(model="small", **options), registry, hardware, source)


def fallbacks(plan: Plan) -> list[Issue]:
    """Return the warnings that attention fell back."""
    return [issue for issue in plan.issues if issue.code == "attention_fallback"]


def test_a_hopper_gpu_is_served_by_triton() -> None:
    """Attention and every op the plugin implements, with nothing to warn of."""
    plan = planned(H200)
    assert plan.attention.name == "triton"
    assert {spec.op for spec in triton.paddock_ops()} == {spec.op for spec in plan.ops if "paddock_triton" in spec.implementation}
    assert fallbacks(plan) == []


def test_an_older_gpu_falls_to_plain_torch_and_is_told() -> None:
    """Attention and ops alike; what a newer one would do is said."""
    plan = planned(A100)
    assert plan.attention.name == "torch"
    assert not any("paddock_triton" in spec.implementation for spec in plan.ops)
    (issue,) = fallbacks(plan)
    assert "needs compute capability 9.0, NVIDIA A100 80GB has 8.0" in issue.message
    assert "use a GPU of compute capability 9.0 or later" in issue.fix


@pytest.mark.parametrize("hardware", [H200, A100], ids=["new", "old"])
def test_without_triton_the_plugin_serves_nothing_and_says_how_to_change_that(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware
) -> None:
    """The plugin is installed, the package is not: found when planning, not when a kernel is first needed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    plan = planned(hardware)
    assert plan.attention.name == "torch"
    assert not any("paddock_triton" in spec.implementation for spec in plan.ops)
    (issue,) = fallbacks(plan)
    assert "needs the package triton, which is not installed" in issue.message
    assert "pip install triton" in issue.fix
    with pytest.raises(PlanError, match="needs the package triton, which is not installed") as caught:
        planned(hardware, attention_backend="triton")
    assert "pip install triton" in caught.value.fix
    with pytest.raises(PlanError, match="needs the package triton, which is not installed"):
        planned(hardware, ops={"gelu": "triton"})


def test_planning_does_not_import_triton_to_find_it() -> None:
    """A process that plans for an H200 has imported neither triton nor torch."""
    code = (
        "import sys\n"
        "from tests.integration.test_gpu_plans import H200, planned\n"
        "assert planned(H200).attention.name == 'triton'\n"
        "sys.exit(str({'torch', 'triton'} & sys.modules.keys()) if {'torch', 'triton'} & sys.modules.keys() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


REFUSED: dict[str, tuple[Hardware, dict[str, Any], dict[str, Any], str, str]] = {
    "old GPU": (A100, {}, {}, "needs compute capability 9.0", "torch can serve"),
    "head size": (H200, {"head_dim": 72}, {}, r"serves head sizes .*, not 72", "torch can serve"),
    "float32": (H200, {}, {"dtype": "float32"}, "takes bfloat16, float16, not float32", "set dtype to bfloat16 or float16"),
    "float32 KV": (H200, {}, {"kv_cache_dtype": "float32"}, "not in float32", "set kv_cache_dtype to bfloat16 or float16 or fp8"),
    "page size": (H200, {}, {"block_size": 24}, "not 24", "set block_size to one of 64, 128, 32, 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_triton_asked_for_is_not_replaced(name: str) -> None:
    """What it cannot serve is refused with the reason and what would do."""
    hardware, changes, options, says, fix = REFUSED[name]
    with pytest.raises(PlanError, match=says) as caught:
        planned(hardware, {**SERVED, **changes}, attention_backend="triton", **options)
    assert "attention_backend is 'triton'" in caught.value.message
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("old GPU", "page size")])
def test_triton_not_asked_for_gives_way_with_a_warning(name: str) -> None:
    """The same values, with nobody's name on them, run in plain torch."""
    hardware, changes, options, _, _ = REFUSED[name]
    plan = planned(hardware, {**SERVED, **changes}, **options)
    assert plan.attention.name == "torch"
    assert [issue.message.startswith("attention backend triton, of rank ") for issue in fallbacks(plan)] == [True]


def test_too_little_memory_is_refused_in_bytes() -> None:
    """A GPU that cannot hold weights, workspace and one sequence: by how much, and what would do."""
    tiny = evolve(H200, name="Small GPU", memory_bytes=GIB // 64, available_bytes=GIB // 64)
    plan = planned(tiny)
    assert plan.attention.name == "triton"
    with pytest.raises(PlanError, match=r"Small GPU needs .* MiB too little") as caught:
        require_runnable(plan)
    assert caught.value.fix
