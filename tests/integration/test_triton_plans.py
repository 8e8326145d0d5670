"""What the Triton plugin does not declare, planning refuses with reasons; what it declares, planning takes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from core.tests.planning.made import published, source

from paddock.config import EngineConfig
from paddock.errors import PlanError
from paddock.planning.backends import Question
from paddock.planning.hardware import Hardware, parse_gpus, this_cpu
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins import AttentionNeeds, Issue
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


def test_fast_sums_keep_an_activation_in_its_product() -> None:
    """The plan names the kernel of the fast product; of what an option asks for by name nothing else runs."""

    def implementation(plan: Plan) -> str:
        return next(spec.implementation for spec in plan.ops if spec.op == "linear_silu_mul_fp8_fast")

    plan = _plan("llama-3.1-70b-fp8", fp8_accumulation="fast")
    assert plan.fp8_accumulation == "fast"
    assert implementation(plan) == "paddock_triton.ops_linear_fp8_gated:linear_silu_mul_fp8_fast"
    own = "paddock.layers.reference:linear_silu_mul_fp8_fast"
    for op in ("silu_mul_fp8", "linear_silu_mul_fp8_fast"):
        assert implementation(_plan("llama-3.1-70b-fp8", fp8_accumulation="fast", ops={op: "paddock"})) == own
    with pytest.raises(PlanError, match="which calls linear_silu_mul_fp8_fast, but ops asks for linear_silu_mul_fp8 of paddock"):
        _plan("llama-3.1-70b-fp8", fp8_accumulation="fast", ops={"linear_silu_mul_fp8": "paddock"})
    both = {"linear_silu_mul_fp8": "paddock", "linear_silu_mul_fp8_fast": "paddock"}
    assert implementation(_plan("llama-3.1-70b-fp8", fp8_accumulation="fast", ops=both)) == own


SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
}


def _int4_plan(group: int, *, hardware: Hardware = H200, dtype: str = "auto", **options: Any) -> Plan:
    """Return the plan of a Llama 576 wide in AutoAWQ's layout."""
    raw = published("llama-3.1-8b-awq")
    raw |= SMALL | {"quantization_config": raw["quantization_config"] | {"group_size": group}}
    return resolve(EngineConfig(model="small", dtype=dtype, **options), PluginHost().collect(), hardware, source(raw))


def _of_groups(plan: Plan) -> list[Issue]:
    return [issue for issue in plan.issues if issue.code == "int4_in_plain_torch"]


@pytest.mark.parametrize(("group", "stuck", "sizes"), [(48, 14, "48"), (96, 14, "96"), (16, 14, "16"), (-1, 12, "576")])
def test_4_bit_linears_whose_groups_no_kernel_is_for_are_warned_of(group: int, stuck: int, sizes: str) -> None:
    """How many, the first by name, their groups, and the sizes to quantise with; whole rows of 1,536 inputs are served."""
    (issue,) = _of_groups(_int4_plan(group))
    assert issue.level == "warning"
    assert issue.message.startswith(f"{stuck} 4-bit linears run in plain torch")
    assert f": {stuck} in groups of {sizes} inputs, the first model.layers.0.self_attn.q_proj (" in issue.message
    assert "linear_int4 takes groups of 32, 64, multiples of 128; linear_int4_fp8 takes " in issue.message
    assert issue.fix.startswith("quantise the model again with --group-size 64 or 32, or set ops to linear_int4=paddock and ")


def test_groups_that_kernels_serve_and_plain_torch_itself_are_no_warning() -> None:
    """Nor is anything said on a CPU, on an older GPU, or in float32: the kernels were not chosen."""
    assert not any(_of_groups(_int4_plan(group)) for group in (32, 64))
    others: list[dict[str, Any]] = [{"hardware": this_cpu()}, {"hardware": parse_gpus("A100")}, {"dtype": "float32"}]
    for other in others:
        assert _of_groups(_int4_plan(48, **other)) == []
    for name in ("llama-3.1-8b-awq", "llama-3.1-70b-awq", "llama-3.1-405b-awq", "falcon-180b-awq"):
        assert _of_groups(_plan(name)) == []


def test_under_strict_such_groups_are_refused_unless_plain_torch_is_asked_for() -> None:
    """By the way out that the warning names."""
    assert [issue.code for issue in _int4_plan(48, strict=True).errors] == ["int4_in_plain_torch"]
    enough = {"linear_int4": "paddock", "linear_int4_fp8": "paddock"}
    assert _int4_plan(48, strict=True, ops=enough).errors == ()
