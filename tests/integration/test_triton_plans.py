"""What the Triton plugin does not declare, planning refuses with reasons; what it declares, planning takes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from core.tests.planning.made import published, source

from paddock.config import EngineConfig
from paddock.errors import PlanError
from paddock.planning.backends import Question
from paddock.planning.hardware import parse_gpus, this_cpu
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins import AttentionNeeds
from paddock.plugins.host import PluginHost
from paddock_triton import plugin

(SPEC,) = plugin.paddock_attention_backends()
H200 = parse_gpus("H200")
SERVED: dict[str, Any] = {
    "hardware": H200,
    "dtype": "bfloat16",
    "head_dim": 128,
    "features": (),
    "block_size": 64,
    "kv": "bfloat16",
}
UNDECLARED: list[tuple[dict[str, Any], str]] = [
    ({"hardware": this_cpu()}, "not on cpu"),
    ({"hardware": parse_gpus("A100")}, "needs compute capability 9.0"),
    ({"hardware": parse_gpus("L4")}, "needs compute capability 9.0"),
    ({"dtype": "float32"}, "not float32"),
    ({"kv": "float32"}, "not in float32"),
    *(({"head_dim": head}, f"not {head}") for head in (8, 24, 40, 72, 112, 160, 192, 512)),
    *(({"block_size": size}, f"not {size}") for size in (1, 8, 48, 256)),
    ({"features": ("sinks",)}, "lacks sinks"),
    ({"dtype": "float32", "head_dim": 8}, "not 8"),
]


def _why_not(**asked: Any) -> list[str]:
    """Return planning's reasons against the backend, for what is always served but for `asked`."""
    want = {**SERVED, **asked}
    needs = AttentionNeeds(num_heads=8, num_kv_heads=2, head_dim=want["head_dim"], features=frozenset(want["features"]))
    question = Question(hardware=want["hardware"], dtype=want["dtype"], needs=needs, block_size=want["block_size"])
    return [obstacle.reason for obstacle in question.why_not(SPEC, want["kv"])]


def _plan(name: str = "llama-3.1-8b", *, gpus: str = "H200", **options: Any) -> Plan:
    """Return the plan of a published model with what is installed."""
    config = EngineConfig(model=name, **options)
    return resolve(config, PluginHost().collect(), parse_gpus(gpus), source(published(name)))


@pytest.mark.parametrize(("asked", "reason"), UNDECLARED, ids=lambda value: str(value)[:60])
def test_what_is_not_declared_is_refused_with_a_reason(asked: dict[str, Any], reason: str) -> None:
    """The reason names what was asked for, beside what is served."""
    assert any(reason in why for why in _why_not(**asked))


def test_every_reason_is_said_at_once() -> None:
    """Two obstacles are two reasons."""
    assert len(_why_not(dtype="float32", head_dim=8, kv="float32", block_size=8)) == 4


def test_every_declared_combination_is_taken() -> None:
    """No reason stands against any dtype, KV dtype, head size, page size and set of features in the declaration."""
    axes = (SPEC.dtypes, SPEC.kv_cache_dtypes, SPEC.head_dims, SPEC.page_sizes, [(), *((each,) for each in SPEC.features)])
    for dtype, kv, head, page, features in product(*axes):
        assert _why_not(dtype=dtype, kv=kv, head_dim=head, block_size=page, features=features) == []


def test_a_published_model_on_an_h200_gets_the_fused_kernels() -> None:
    """Attention and every op come from the plugin, with its preferred pages."""
    plan = _plan()
    assert (plan.attention.name, plan.page_size) == ("triton", SPEC.page_sizes[0])
    assert {spec.op for spec in plan.ops if spec.implementation.startswith("paddock_triton")} >= set(plugin.OPS)


def test_float32_and_older_gpus_fall_back_to_plain_torch_and_say_why() -> None:
    """An automatic choice passes over the backend, with its reasons in the plan."""
    for options in ({"dtype": "float32"}, {"gpus": "A100"}):
        plan = _plan(**options)
        assert plan.attention.name == "torch"
        assert [rejected.value for rejected in plan.choice("attention_backend").rejected] == ["triton"]


def test_asked_for_by_name_it_is_never_replaced() -> None:
    """What it cannot serve is an error with the reason, not another backend."""
    with pytest.raises(PlanError, match="not float32"):
        _plan(attention_backend="triton", dtype="float32")


@pytest.mark.parametrize("name", ["llama-3.1-70b", "llama-3.1-405b", "falcon-180b", "falcon-180b-awq"])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_published_families_attend_in_the_kernels(name: str, kv: str) -> None:
    """Their heads are among those declared, with plain and with FP8 pages, whether or not the weights fit one GPU."""
    assert _plan(name, kv_cache_dtype=kv).attention.name == "triton"
