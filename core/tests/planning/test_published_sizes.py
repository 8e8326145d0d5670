"""The ledger against arithmetic on published shapes, done by hand from the models' papers and checkpoint formats.

Llama: a layer's linears hold 2 x heads x D x E (q, o) + 2 x kv x D x E (k, v) + 3 x F x E (gate, up, down) weights.
  8B:   32 layers x   218,103,808 =   6,979,321,856, and   1,050,939,392 in embedding, head and norms:   8,030,261,248
  70B:  80 layers x   855,638,016 =  68,451,041,280, and   2,102,665,216:                               70,553,706,496
  405B: 126 layers x 3,187,671,040 = 401,646,551,040, and   4,206,837,760:                              405,853,388,800
Falcon 180B: 80 layers x (15,872 + 14,848 + 2 x 59,392) x 14,848 = 177,586,831,360, and 970,257,408 in the tied
  embedding and the norms: 178,557,088,768
Bytes of each format, for `plain` weights that stay in bf16 and `stored` ones that do not:
  bf16    2 x all
  fp8     2 x plain + stored + 8 bytes (weight and input scale) a part of a linear
  fbgemm  the MLPs of all layers but the first and the last are stored: 1 byte each, and 4 bytes a row
  awq     2 x plain + stored x (1/2 + 1/2/128 + 2/128): words, packed zero points, float16 scales
"""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from core.tests.planning.made import published, source

from paddock.config import EngineConfig
from paddock.errors import PlanError
from paddock.planning.hardware import parse_gpus
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins.host import PluginHost

pytest.importorskip("paddock_llama")
pytest.importorskip("paddock_falcon")
pytest.importorskip("paddock_quant_fp8")
pytest.importorskip("paddock_quant_awq")

WEIGHT_BYTES = {
    "llama-3.1-8b": 16_060_522_496,  # 2 x 8,030,261,248
    "llama-3.1-8b-fp8": 9_081_202_432,  # 2 x 1,050,939,392 + 6,979,321,856 + 8 x 7 x 32
    "llama-3.1-8b-fp8-fbgemm": 10_779_631_616,  # stored 30 x 3 x 14336 x 4096 = 5,284,823,040; scales 3,932,160
    "llama-3.1-8b-awq": 5_727_854_592,  # 2 x 1,050,939,392 + 3,489,660,928 + 27,262,976 + 109,051,904
    "llama-3.1-70b": 141_107_412_992,  # 2 x 70,553,706,496
    "llama-3.1-70b-fp8": 72_656_376_192,  # 2 x 2,102,665,216 + 68,451,041,280 + 8 x 7 x 80
    "llama-3.1-70b-fp8-fbgemm": 86_165_700_608,  # stored 78 x 3 x 28672 x 8192 = 54,962,159,616; scales 20,447,232
    "llama-3.1-70b-awq": 39_767_785_472,  # 2 x 2,102,665,216 + 34,225,520,640 + 267,386,880 + 1,069,547,520
    "llama-3.1-405b": 811_706_777_600,  # 2 x 405,853,388,800
    "llama-3.1-405b-fp8": 410_060_233_616,  # 2 x 4,206,837,760 + 401,646,551,040 + 8 x 7 x 126
    "llama-3.1-405b-fp8-fbgemm": 487_229_259_776,  # stored 124 x 3 x 53248 x 16384 = 324,538,466,304; scales 60,948,480
    "llama-3.1-405b-awq": 217_081_610_240,  # 2 x 4,206,837,760 + 200,823,275,520 + 1,568,931,840 + 6,275,727,360
    "falcon-180b": 357_114_177_536,  # 2 x 178,557,088,768
    "falcon-180b-fp8": 179_527_348_736,  # 2 x 970,257,408 + 177,586,831,360 + 8 x 4 x 80
    "falcon-180b-awq": 94_202_423_296,  # 2 x 970,257,408 + 88,793,415,680 + 693,698,560 + 2,774,794,240
}
# 2 (K and V) x layers x KV heads x head size x 2 bytes.
KV_BYTES_PER_TOKEN = {
    "llama-3.1-8b": 131_072,  # 2 x 32 x 8 x 128 x 2
    "llama-3.1-70b": 327_680,  # 2 x 80 x 8 x 128 x 2
    "llama-3.1-405b": 516_096,  # 2 x 126 x 8 x 128 x 2
    "falcon-180b": 163_840,  # 2 x 80 x 8 x 64 x 2
}


@pytest.fixture(scope="module")
def installed() -> Any:
    """Return everything that is installed."""
    return PluginHost().collect()


def planned(installed: Any, name: str, gpus: str = "H200", **options: Any) -> Plan:
    """Return the plan of a published config."""
    return resolve(EngineConfig(model=name, **options), installed, parse_gpus(gpus), source(published(name)))


@pytest.mark.parametrize("name", WEIGHT_BYTES)
def test_weights_are_those_of_arithmetic_to_a_thousandth(installed: Any, name: str) -> None:
    """Each published checkpoint takes the bytes its shapes and format imply."""
    weights = planned(installed, name).weight_bytes
    assert abs(weights - WEIGHT_BYTES[name]) <= WEIGHT_BYTES[name] // 1000


@pytest.mark.parametrize("name", KV_BYTES_PER_TOKEN)
def test_unquantised_weights_are_those_of_arithmetic_to_the_byte(installed: Any, name: str) -> None:
    """Plain weights leave nothing to estimate."""
    assert planned(installed, name).weight_bytes == WEIGHT_BYTES[name]


@pytest.mark.parametrize("name", WEIGHT_BYTES)
def test_a_token_of_kv_takes_what_its_heads_take(installed: Any, name: str) -> None:
    """KV depends on the model's shape and the KV dtype, not on how the weights are stored."""
    family = next(known for known in KV_BYTES_PER_TOKEN if name.startswith(known))
    assert planned(installed, name).kv_bytes_per_token == KV_BYTES_PER_TOKEN[family]
    assert planned(installed, name, kv_cache_dtype="fp8").kv_bytes_per_token == KV_BYTES_PER_TOKEN[family] // 2


def test_the_405b_with_sixteen_kv_heads_counts_as_many(installed: Any) -> None:
    """Both published variants of Llama 3.1 405B are read: the number of KV heads is the config's."""
    raw = published("llama-3.1-405b") | {"num_key_value_heads": 16}
    plan = resolve(EngineConfig(model="kv16"), installed, parse_gpus("H200"), source(raw))
    assert plan.weight_bytes == 2 * 410_081_247_232
    assert plan.kv_bytes_per_token == 2 * 516_096


def test_the_180b_with_a_head_of_its_own_counts_it(installed: Any) -> None:
    """A derivative that unties the head has the 179,522,565,120 parameters that the published files hold."""
    raw = published("falcon-180b") | {"tie_word_embeddings": False}
    assert resolve(EngineConfig(model="untied"), installed, parse_gpus("H200"), source(raw)).weight_bytes == 2 * 179_522_565_120


@pytest.mark.parametrize("gpus", ["2xH200", "4xH200", "8xH200"])
def test_the_180b_is_cut_by_whole_kv_groups(installed: Any, gpus: str) -> None:
    """Every rank holds its share of all but the norms, at 2, 4 and 8 ranks, and nothing twice."""
    plan = planned(installed, "falcon-180b", gpus)
    norms = 2 * (80 * 2 + 1) * 2 * 14_848
    world = plan.tensor_parallel_size
    assert str(world) == gpus[0]
    assert plan.ledger.weights.total == (WEIGHT_BYTES["falcon-180b"] - norms) // world + norms
    assert "held_alike" not in {issue.code for issue in plan.issues}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_one_kv_head_of_falcon_7b_is_held_by_every_rank(installed: Any, world: int) -> None:
    """Ranks cut the MLP and the vocabulary and repeat attention and its pages, and the plan says so."""
    seven = {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "multi_query": True, "model_type": "falcon"}
    raw = seven | {"architectures": ["FalconForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 65024}
    plan = resolve(EngineConfig(model="7b"), installed, parse_gpus(f"{world}xH200"), source(raw))
    layer = (4672 + 4544) * 4544 + 2 * 18_176 * 4544 // world
    assert plan.tensor_parallel_size == world
    assert plan.ledger.weights.total == 2 * (32 * layer + 65_024 * 4544 // world + (32 + 1) * 2 * 4544)
    assert plan.kv_bytes_per_token == world * 8_192  # 2 x 32 x 1 x 64 x 2 bytes on each
    (issue,) = [issue for issue in plan.issues if issue.code == "held_alike"]
    assert f"{world} copies each of self_attention.query_key_value, self_attention.dense, the KV pages" in issue.message


def test_ranks_beyond_the_kv_groups_of_the_180b_are_refused(installed: Any) -> None:
    """Sixteen ranks would sum every group of the attention output twice: asked for, an error; else pipeline stages take over."""
    with pytest.raises(PlanError, match="'attended' has 8 kv_heads: 16 ranks"):
        planned(installed, "falcon-180b", "16xH200", tensor_parallel_size=16)
    plan = planned(installed, "falcon-180b", "16xH200")
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size) == (8, 2)


def test_eight_gpus_hold_an_eighth_of_the_cut_weights_each(installed: Any) -> None:
    """Tensor parallelism divides everything but norms and the scalars of a whole part."""
    ledger = planned(installed, "llama-3.1-405b", "8xH200").ledger
    norms = 2 * (126 * 2 + 1) * 16_384
    assert ledger.weights.norms == norms
    assert ledger.weights.total == (WEIGHT_BYTES["llama-3.1-405b"] - norms) // 8 + norms


def test_what_the_h200_is_bought_for_fits(installed: Any) -> None:
    """Falcon-180B in INT4 runs on one H200, Llama 3.1 70B in FP8 too, and Llama 3.1 405B in bf16 does not."""
    assert not planned(installed, "falcon-180b-awq").errors
    assert not planned(installed, "llama-3.1-70b-fp8").errors
    (issue,) = planned(installed, "llama-3.1-405b").errors
    assert issue.code == "out_of_memory"


def test_a_checkpoint_in_fewer_bits_is_advised_where_it_would_fit(installed: Any) -> None:
    """Falcon-180B in FP8 is too large for one H200 and hears of INT4; INT4 on a smaller GPU hears only of more GPUs."""
    (issue,) = planned(installed, "falcon-180b-fp8").errors
    assert issue.fix == "use 2 GPUs (tp 2 x pp 1); use an INT4 checkpoint (about 89.7 GiB of weights each)"
    (issue,) = planned(installed, "falcon-180b-awq", "1xH100").errors
    assert issue.fix == "use 2 GPUs (tp 2 x pp 1)"


def test_int4_405b_fits_two_gpus_once_something_spreads_it(installed: Any) -> None:
    """The per-GPU ledger is there before the plugin that spreads a model is, and says that memory suffices."""
    plan = planned(installed, "llama-3.1-405b-awq", "2xH200", max_model_len=8192)
    assert [issue.code for issue in plan.errors] == ([] if installed.parallel_strategies else ["no_tp_plugin"])
    assert plan.ledger.missing_bytes == 0
    assert plan.full_sequences >= 4


def test_groups_that_straddle_gpus_are_sliced_where_the_format_can(installed: Any) -> None:
    """Falcon-180B's attention output over 8 GPUs is 14.5 groups of 128 each, kept as groups of 64 in 15 blocks of 128 inputs."""
    plan = planned(installed, "falcon-180b-awq", "8xH200")
    assert plan.tensor_parallel_size == 8
    outputs, inputs, layers = 14_848, 14_848, 80
    a_group = 2 * outputs + outputs // 2  # float16 scales, packed zero points
    whole = planned(installed, "falcon-180b-awq").ledger.weights.layers
    groups, codes = 8 * 15 * 2 - inputs // 128, outputs * (8 * 15 * 128 - inputs) // 2  # of half a byte
    assert 8 * plan.ledger.weights.layers - whole == layers * (a_group * groups + codes)


def test_groups_that_would_straddle_gpus_are_found_before_any_gpu_is(installed: Any) -> None:
    """Inputs of a GPTQ checkpoint with desc_act are in any group, so one rank holds them all: asked otherwise, it is an error."""
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    raw = published("llama-3.1-8b") | {"quantization_config": entry}
    with pytest.raises(PlanError, match=r"0\.5 groups of 4096 \(all belong together: .*desc_act\)") as error:
        resolve(EngineConfig(model="made", tensor_parallel_size=2), installed, parse_gpus("2xH200"), source(raw))
    assert "tensor_parallel_size 1 would divide it" in error.value.fix
    in_order = published("llama-3.1-8b") | {"quantization_config": entry | {"desc_act": False}}
    assert resolve(EngineConfig(model="made"), installed, parse_gpus("2xH200"), source(in_order)).tensor_parallel_size == 2


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_fp8_activations_beside_4_bit_weights_need_a_gpu_that_has_fp8(installed: Any, name: str) -> None:
    """An A100 has not: the plan is refused with the format and what it needs; a CPU computes the definition."""
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": token}
    entries: dict[str, Any] = {
        "modelopt": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "ignore": ["lm_head"]},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    }
    raw = published("llama-3.1-8b") | {"quantization_config": entries[name]}
    ampere = evolve(parse_gpus("H200"), name="NVIDIA A100", compute_capability=(8, 0))
    with pytest.raises(PlanError, match=r"needs compute capability 8\.9, NVIDIA A100 has 8\.0"):
        resolve(EngineConfig(model="made"), installed, ampere, source(raw))
    plan = resolve(EngineConfig(model="made"), installed, parse_gpus("H200"), source(raw))
    assert plan.quantization is not None
    assert plan.quantization.name == f"{name}-w4a8"


def test_activations_are_what_a_layer_holds_at_its_widest(installed: Any) -> None:
    """8B, in bf16, a token: gate and up 28,672, their product 14,336, q, k and v 6,144, and five residual streams of 4,096."""
    plan = planned(installed, "llama-3.1-8b", max_num_batched_tokens=8192)
    assert plan.ledger.workspace.activations == 8192 * 2 * (28_672 + 14_336 + 6_144 + 5 * 4_096)
