"""What the first steps of a small Llama and a small Falcon launch on a Hopper GPU has been compiled by then."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from plugins.triton.tests.apart import run

from tests.integration.test_bench_startup import CONFIG

pytest.importorskip("triton")

MODEL = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 3000, "max_position_embeddings": 256}


FALCON: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "new_decoder_architecture": True,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 3000,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}
PUBLISHED_VOCAB = 128_256  # Llama 3.1's: the number of rows decides in how many pieces a row of it is split
FP8_PRODUCT, NORM, ROTATION = "_ring_kernel", "_rms_norm_kernel", "_rope_and_cache_kernel"


def _first_steps(folder: Path, config: dict[str, Any], *words: str) -> dict[str, list[str]]:
    (folder / "config.json").write_text(json.dumps(config))
    done = run("tests.integration.first_steps_for_hopper", str(folder), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert found["largest"] == []
    assert found["first request"] == []
    assert found["other sizes"] == []
    assert found["filters"] == []
    return found


def test_the_first_steps_compile_nothing_more(tmp_path: Path) -> None:
    """The largest step, the first prompt and the first decode find every kernel, whether their tokens are likeliest or drawn.

    So do small steps of every size, mixed ones, and filters for 2 to 256 rows. To choose tokens seven kernels are compiled: rows
    in any number of pieces, and every step of filters, share them. Two more are left to the first row edited or penalised.
    """
    found = _first_steps(tmp_path, MODEL | {"vocab_size": PUBLISHED_VOCAB})
    compiled = Counter(found["ahead"])
    most = {"_race_kernel": 3, "_finish_kernel": 2, "_step_kernel": 1, "_least_kernel": 1}
    assert {name: compiled[name] for name in most if compiled[name] > most[name]} == {}
    assert found["float32"] == ["_race_kernel"] * 2
    layers, sampler = {"_prefill", "_decode", "_cut", "_one_kernel", "_ring_kernel"}, {"_race_kernel", "_finish_kernel"}
    assert layers | sampler | {"_step_kernel", "_least_kernel"} <= {*found["ahead"]}


@pytest.mark.parametrize("static", [True, False])
def test_a_decode_in_fp8_is_fused(static: bool, tmp_path: Path) -> None:
    """Norms and activations emit FP8 themselves, and by a static scale attention and gate and up do: eight kernels, or ten."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "ignored_layers": ["lm_head"]}
    found = _first_steps(tmp_path, MODEL | {"quantization_config": fp8}, "fp8")
    attention = ["_decode"] if static else ["_decode", "_token_kernel"]
    gate_up = [FP8_PRODUCT] if static else [FP8_PRODUCT, "_token_kernel"]
    layer = [NORM, FP8_PRODUCT, ROTATION, *attention, FP8_PRODUCT, NORM, *gate_up, FP8_PRODUCT]
    launched = [name for name in found["decode"] if name != "_cut"]  # how attention's work is cut, once a step
    assert launched[1 : 1 + 2 * len(layer)] == 2 * layer
    assert sorted(found["torch"]) == [
        "add.Tensor",
        "zeros.default",
    ]  # the last residual, and the counters of attention, once a step


def test_a_decode_with_fast_sums_launches_what_one_with_exact_sums_does(tmp_path: Path) -> None:
    """The product of gate and up ends in their activation: eight kernels a layer."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    model = MODEL | {"quantization_config": fp8}
    exact, fast = (_first_steps(tmp_path, model, "fp8", *words) for words in ([], ["fast"]))
    layer = [NORM, FP8_PRODUCT, ROTATION, "_decode", FP8_PRODUCT, NORM, FP8_PRODUCT, FP8_PRODUCT]
    for found in (exact, fast):
        assert [name for name in found["decode"] if name != "_cut"][1 : 1 + 2 * len(layer)] == 2 * layer
    assert fast["decode"] == exact["decode"]
    assert {*fast["ahead"]} == {*exact["ahead"]}


def test_a_decode_of_block_scales_is_fused(tmp_path: Path) -> None:
    """Norms and activations emit a scale a token and 128 features themselves: a layer is ten kernels, none torch's."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"]}
    found = _first_steps(tmp_path, MODEL | {"quantization_config": fp8}, "fp8", "attention")
    product, group = FP8_PRODUCT, "_group_kernel"
    layer = [NORM, product, ROTATION, "_decode", group, product, NORM, product, group, product]
    launched = [name for name in found["decode"] if name != "_cut"]
    assert launched[1 : 1 + 2 * len(layer)] == 2 * layer
    assert sorted(found["torch"]) == ["add.Tensor", "zeros.default"]


def test_a_falcon_copies_and_adds_nothing_between_its_kernels(tmp_path: Path) -> None:
    """Two KV groups, a norm for each branch: rotation reads the projection as it lies, and the next norm adds both branches."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    found = _first_steps(tmp_path, FALCON | {"quantization_config": fp8}, "fp8")
    norms, activation = ["_layer_norm_kernel"] * 2, "_token_kernel"
    layer = [*norms, FP8_PRODUCT, ROTATION, "_decode", activation, FP8_PRODUCT, FP8_PRODUCT, activation, FP8_PRODUCT]
    launched = [name for name in found["decode"] if name != "_cut"]
    assert launched[1 : 1 + 2 * len(layer)] == 2 * layer
    assert sorted(found["torch"]) == ["add.Tensor", "add.Tensor", "zeros.default"]  # the last block's branches and residual
