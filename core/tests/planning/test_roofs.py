"""The roof: its terms by hand, what a plan asks of its devices, and published models on an H200."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from core.tests.planning import made

from paddock.config import EngineConfig
from paddock.planning.hardware import parse_gpus
from paddock.planning.resolve import resolve
from paddock.planning.roofs import Ceilings, Demand, ceilings_of, demand_of, roof
from paddock.plugins.host import PluginHost

CEILINGS = Ceilings(
    name="made", bytes_per_second=1e9, bf16_flops=1e12, fp8_flops=2e12, attention_flops=5e11, source="made for this test"
)
DEMAND = Demand(
    layer_parameters={"bf16": 10_000_000},
    head_parameters={"bf16": 1_000_000},
    weight_bytes=22_000_000,
    attention_width=256,
    kv_bytes_per_token=1000,
)
# Output tokens a second on an H200. Milliseconds of prefill, its attention, decode and KV, by hand from the published shapes:
#   8B bf16: 2 x 6.979e9 x 128 / 690e12 = 2.6, 0.0, 128 x 15.01e9 / 4.3e12 = 446.8, 128 x 192 x 131,072 / 4.3e12 = 0.7
#   70B FP8: 2 x 68.45e9 x 2048 / 1300e12 = 215.7, 9.6, 128 x 70.55e9 / 4.3e12 = 2100 (over 64 at once: 32.8), 10.3
#   Falcon-180B INT4, 64 at once: 35.0, 0.1, 128 x 94.2e9 / 64 / 4.3e12 = 43.8 (operations: 35.3), 0.5
PUBLISHED = {
    ("llama-3.1-8b", "H200", 1, 128, 128): 284,
    ("llama-3.1-70b-fp8", "H200", 1, 2048, 128): 54.8,
    ("llama-3.1-70b-fp8", "H200", 64, 2048, 128): 477,
    ("llama-3.1-70b-fp8", "2xH200", 64, 2048, 128): 954,
    ("falcon-180b-awq", "H200", 64, 128, 128): 1607,
}


def test_each_term_is_the_formulas() -> None:
    """Prefill by operations, decode by whatever takes longer, KV by its mean length, all in seconds a request."""
    found = roof(DEMAND, CEILINGS, isl=100, osl=10, at_once=4)
    assert found.prefill_matmul == pytest.approx(2 * 10e6 * 100 / 1e12)  # the head makes no logits for a prompt
    assert found.prefill_attention == pytest.approx(2 * 256 * 100**2 / 5e11)
    assert found.decode_matmul == pytest.approx(10 * 22e6 / (4 * 1e9))  # bytes: 5.5 ms a token, operations 0.022 ms
    assert found.decode_kv == pytest.approx(10 * (100 + 5) * 1000 / 1e9)
    assert found.tokens_per_second == pytest.approx(10 / found.seconds)


def test_many_requests_are_bound_by_operations() -> None:
    """Weights are read once for all, so that at some number of requests arithmetic takes longer."""
    assert roof(DEMAND, CEILINGS, isl=1, osl=10, at_once=10_000).decode_matmul == pytest.approx(10 * 2 * 11e6 / 1e12)


def test_a_ceiling_nobody_measured_bounds_nothing() -> None:
    """With bandwidth alone known, only its terms are left."""
    bare = evolve(CEILINGS, bf16_flops=None, attention_flops=None)
    found = roof(DEMAND, bare, isl=100, osl=10, at_once=1)
    assert found.prefill_matmul == found.prefill_attention == 0
    assert found.decode_matmul == pytest.approx(10 * 22e6 / 1e9)


def test_devices_share_the_work_but_a_pipeline_needs_requests_to_overlap() -> None:
    """Two tensor-parallel ranks halve every term; two stages do so for two requests, and not for one."""
    alone = roof(DEMAND, CEILINGS, isl=100, osl=10, at_once=1).seconds
    tensor, pipeline = evolve(DEMAND, tensor_parallel=2), evolve(DEMAND, pipeline_parallel=2)
    assert roof(tensor, CEILINGS, isl=100, osl=10, at_once=1).seconds == pytest.approx(alone / 2)
    assert roof(pipeline, CEILINGS, isl=100, osl=10, at_once=1).seconds == pytest.approx(alone)
    two = roof(DEMAND, CEILINGS, isl=100, osl=10, at_once=2).seconds
    assert roof(pipeline, CEILINGS, isl=100, osl=10, at_once=2).seconds == pytest.approx(two / 2)


def test_ceilings_are_measured_or_of_bandwidth_alone_or_unknown() -> None:
    """An H200 and an H100 have all four; a GPU with a data sheet its bandwidth; a CPU none."""
    h200, h100, l4 = (ceilings_of(name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA L4"))
    assert h200 is not None
    assert h100 is not None
    assert l4 is not None
    assert (h200.bytes_per_second, h200.bf16_flops, h200.fp8_flops, h200.attention_flops) == (4.3e12, 690e12, 1300e12, 570e12)
    assert (h100.bytes_per_second, h100.bf16_flops, h100.attention_flops) == (3.0e12, 690e12, 570e12)
    assert l4.bytes_per_second == pytest.approx(0.27e12)
    assert l4.matmul_flops("bf16") is l4.attention_flops is None
    assert ceilings_of("AMD EPYC") is None


def test_a_plan_says_what_it_asks() -> None:
    """Linears count, embeddings and norms do not; a tied head reads the embedding's bytes."""
    layer = (64 + 32 + 32) * 64 + 64 * 64 + 128 * 64 + 64 * 128
    plain, tied = (demand_of(made.planned({"tied": tied})) for tied in (False, True))
    assert plain.layer_parameters == {"bf16": 4 * layer}
    assert plain.head_parameters == tied.head_parameters == {"bf16": 96 * 64}
    biases = 4 * (64 + 32 + 32)
    assert plain.weight_bytes == tied.weight_bytes == 2 * (4 * layer + biases + 96 * 64)
    assert plain.attention_width == 4 * 4 * 16
    assert plain.kv_bytes_per_token == 2 * 4 * 2 * 16 * 2


def test_narrow_weights_are_held_to_the_roof_of_fp8() -> None:
    """INT4 words count as FP8 products; what the format leaves plain stays as it is."""
    found = demand_of(made.planned({"quantization_config": {"quant_method": "grouped"}}, kv_cache_dtype="bfloat16"))
    assert list(found.layer_parameters) == ["fp8"]
    assert list(found.head_parameters) == ["bf16"]


@pytest.fixture(scope="module")
def installed() -> Any:
    """Return everything that is installed."""
    for name in ("paddock_llama", "paddock_falcon", "paddock_quant_fp8", "paddock_quant_awq"):
        pytest.importorskip(name)
    return PluginHost().collect()


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_models_have_the_roofs_found_by_hand(installed: Any, case: tuple[str, str, int, int, int]) -> None:
    """Within a percent, FP8 KV where weights are narrow."""
    name, gpus, requests, isl, osl = case
    kv = "auto" if name == "llama-3.1-8b" else "fp8"
    config = EngineConfig(model=name, kv_cache_dtype=kv, tensor_parallel_size=2 if gpus == "2xH200" else None)
    plan = resolve(config, installed, parse_gpus(gpus), made.source(made.published(name)))
    ceilings = ceilings_of("NVIDIA H200")
    assert ceilings is not None
    found = roof(demand_of(plan), ceilings, isl=isl, osl=osl, at_once=requests)
    assert found.tokens_per_second == pytest.approx(PUBLISHED[case], rel=0.01)
