"""What planning and loading say of FP8 checkpoints that are wrong, of machines that cannot, and of plain ones to be quantised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock.checkpoint.source import open_source
from paddock.config import EngineConfig
from paddock.errors import CheckpointError, PlanError
from paddock.planning.hardware import GIB, Hardware
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins.host import PluginHost
from paddock.testing.contracts import build_model, checkpoint
from paddock_falcon import plugin as falcon
from paddock_llama import plugin as llama
from paddock_quant_fp8 import plugin as fp8
from tests.zoo.formats import store_rows
from tests.zoo.test_published_fp8 import BOUND, PUBLISHED, built, copied, error_of, logits, planned, rewrite
from tests.zoo.test_quantised_checkpoints import LLAMA, LLAMA_SPEC, is_plain

DOWN = "model.layers.0.mlp.down_proj"
TOKENS = torch.arange(20) * 7 % 62
BIG = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
BIG |= {"num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 4096}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def on_gpus(folder: Path, capability: tuple[int, int] = (9, 0), count: int = 1, **options: Any) -> Plan:
    """Return the plan of a folder for GPUs, with the core's own backend."""
    size = 80 * GIB
    hardware = Hardware(
        device="cuda", name="Some GPU", count=count, memory_bytes=size, available_bytes=size, compute_capability=capability
    )
    registry = PluginHost(plugins=(llama, falcon, fp8), autoload=False).collect()
    return resolve(EngineConfig(model=str(folder), **options), registry, hardware, open_source(str(folder)))


def config_only(folder: Path, **config: Any) -> Path:
    """Write a config.json without weights."""
    raw = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def plain_folder(folder: Path) -> dict[str, Tensor]:
    """Write a plain Llama of random weights; return its tensors."""
    tensors = {
        name: tensor.clone()
        for name, tensor in checkpoint(build_model(LLAMA_SPEC, LLAMA, seed=4).model).items()
        if not name.endswith(("k_scale", "v_scale"))
    }
    save_file(tensors, folder / "model.safetensors")
    config_only(folder, **LLAMA)
    return tensors


def edited(name: str, folder: Path, **tensors: Tensor | None) -> Path:
    """Return a copy of a published checkpoint with tensors of `DOWN` replaced, or taken away where None."""
    copy = copied(name, folder)
    stored = load_file(copy / "model.safetensors") | {f"{DOWN}.{key}": tensor for key, tensor in tensors.items()}
    save_file({key: tensor for key, tensor in stored.items() if tensor is not None}, copy / "model.safetensors")
    return copy


def test_a_plain_checkpoint_quantised_while_read_is_the_one_quantised_before(tmp_path: Path) -> None:
    """Asked for fp8, a plain checkpoint gives the logits of the same weights stored with a scale a row, to the last bit."""
    before, online = tmp_path / "before", tmp_path / "online"
    before.mkdir()
    online.mkdir()
    stored: dict[str, Tensor] = {}
    for name, tensor in plain_folder(online).items():
        quantised = {"weight": tensor} if is_plain(name) else store_rows(tensor)[0]
        stored |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in quantised.items()}
    save_file(stored, before / "model.safetensors")
    config_only(before, **LLAMA, quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1e9})
    one, two = planned(before), planned(online, quantization="fp8")
    assert one.ledger.weights == two.ledger.weights
    assert torch.equal(logits(built(two, online), TOKENS), logits(built(one, before), TOKENS))


def test_another_recipe_than_the_checkpoints_is_refused() -> None:
    """FP8 of one tool is not FP8 of another: the error says both names."""
    with pytest.raises(PlanError, match="quantization is 'fp8', but the checkpoint is quantised as 'modelopt'"):
        planned(PUBLISHED / "modelopt-fp8", quantization="fp8")


def test_an_algorithm_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    """ModelOpt writes many: the error says which one this is, and the way out which ones would do."""
    config_only(tmp_path, **BIG, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(PlanError, match=r"'modelopt' \(quant_algo 'NVFP4'\)") as caught:
        on_gpus(tmp_path)
    assert caught.value.fix.startswith("of modelopt, this is read: FP8, FP8_PER_CHANNEL_PER_TOKEN and FP8_PB_WO")


@pytest.mark.parametrize("name", ["modelopt-fp8", "compressed-block", "compressed-weights"])
def test_a_gpu_without_fp8_is_refused_before_memory_is_taken(name: str) -> None:
    """The plan names the format, the compute capability it needs and the one there is."""
    with pytest.raises(PlanError, match=r"(modelopt|compressed-tensors) needs compute capability 8\.9, Some GPU has 8\.0"):
        on_gpus(PUBLISHED / name, (8, 0))
    assert on_gpus(PUBLISHED / name, (8, 9)).quantization is not None


def test_a_missing_scale_is_said_by_the_plan(tmp_path: Path) -> None:
    """Config.json and tensors are quoted beside each other."""
    (issue,) = planned(edited("modelopt-fp8", tmp_path, input_scale=None)).errors
    assert issue.code == "checkpoint_disagrees"
    assert (
        f"{DOWN}: config.json means input_scale, weight, weight_scale; the checkpoint holds weight, weight_scale" in issue.message
    )


def test_a_list_that_forgets_a_plain_linear_is_said_by_the_plan(tmp_path: Path) -> None:
    """The checkpoint spares one linear; a config whose list does not is another checkpoint's."""
    folder = copied("compressed-static", tmp_path)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite(folder, quantization_config=entry | {"ignore": ["lm_head"]})
    (issue,) = planned(folder).errors
    assert "o_proj: config.json means input_scale, weight, weight_scale; the checkpoint holds weight" in issue.message


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf, 1e5])
def test_unusable_scales_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    """A scale that is no number, not positive or absurd is found before anything is computed, of weights and of KV."""
    folder = edited("modelopt-fp8", tmp_path, weight_scale=torch.tensor(bad))
    with pytest.raises(CheckpointError, match=f"weight_scale of {DOWN} holds"):
        built(planned(folder), folder)
    kv = copied("modelopt-fp8-kv", tmp_path)
    name = "model.layers.1.self_attn.k_proj.k_scale"
    save_file(load_file(kv / "model.safetensors") | {name: torch.tensor(bad)}, kv / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the k scale of model\.layers\.1\.self_attn is"):
        built(planned(kv), kv)


def test_scales_that_leave_nothing_of_inputs_or_kv_are_refused(tmp_path: Path) -> None:
    """A row of weights may die out; inputs, keys and values cut off at next to nothing are a damaged checkpoint."""
    folder = edited("modelopt-fp8", tmp_path, input_scale=torch.tensor(1e-30))
    with pytest.raises(CheckpointError, match=f"input_scale of {DOWN} holds 1"):
        built(planned(folder), folder)
    kv = copied("modelopt-fp8-kv", tmp_path)
    name = "model.layers.1.self_attn.v_proj.v_scale"
    save_file(load_file(kv / "model.safetensors") | {name: torch.tensor(1e-30)}, kv / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the v scale of model\.layers\.1\.self_attn is 1"):
        built(planned(kv), kv)
    dead_31 = torch.full((32, 1), 1e-30)
    dead_31[5] = 0.01
    dead = edited("compressed-dynamic", tmp_path, weight_scale=dead_31)
    assert torch.isfinite(logits(built(planned(dead), dead), TOKENS % 48)).all()


@pytest.mark.parametrize("name", ["modelopt-fp8", "compressed-dynamic"])
def test_scales_that_leave_nothing_of_a_weight_are_refused(tmp_path: Path, name: str) -> None:
    """Single rows may die out; where all of a linear's are next to nothing the checkpoint is damaged."""
    shape = () if name == "modelopt-fp8" else (32, 1)
    folder = edited(name, tmp_path, weight_scale=torch.full(shape, 1e-25))
    with pytest.raises(CheckpointError, match=f"weight_scale of {DOWN} holds nothing above 1e-25") as caught:
        built(planned(folder), folder)
    assert "some are above 1e-16" in caught.value.fix


def test_cuts_that_break_blocks_are_refused_with_those_that_do_not(tmp_path: Path) -> None:
    """Eight ranks share Llama 70B's blocks; of 8 KV heads of 64 they would break them, and the error says which sizes do not."""
    whole = config_only(tmp_path, **BIG, quantization_config=BLOCKS)
    assert [issue.code for issue in on_gpus(whole, count=8, tensor_parallel_size=8).errors] == ["no_tp_plugin"]
    config_only(tmp_path, **(BIG | {"head_dim": 64}), quantization_config=BLOCKS)
    with pytest.raises(PlanError, match=r"self_attn\.q_proj: 512 outputs over 8 ranks are 64 each, 0\.5 groups of 128") as caught:
        on_gpus(tmp_path, count=8, tensor_parallel_size=8)
    assert "tensor_parallel_size 1, 2, 4 would divide it" in caught.value.fix


def test_the_ledger_counts_scales_of_blocks(tmp_path: Path) -> None:
    """A byte a weight and four a block, part by part."""
    plan = on_gpus(config_only(tmp_path, **BIG, quantization_config=BLOCKS))
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    expected = sum(outs * ins + 4 * (outs // 128) * (ins // 128) for outs, ins in shapes)
    assert plan.ledger.weights.layers == 4 * expected


def test_a_plain_checkpoint_too_large_is_told_that_it_may_become_fp8(tmp_path: Path) -> None:
    """The way out that needs no other checkpoint is named with the option, and taken it fits."""
    large = BIG | {"num_hidden_layers": 60, "max_position_embeddings": 512}
    (issue,) = on_gpus(config_only(tmp_path, **large), max_model_len=512).errors
    assert issue.code == "out_of_memory"
    assert "set quantization to fp8, which quantises this one while it is read" in issue.fix
    assert not on_gpus(tmp_path, max_model_len=512, quantization="fp8").errors


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors", "fbgemm_fp8"])
def test_formats_of_checkpoints_alone_say_what_can_be_asked_for(tmp_path: Path, name: str) -> None:
    """Of the FP8 formats `fp8` quantises plain checkpoints; the others say so."""
    with pytest.raises(PlanError, match="is not quantised") as caught:
        on_gpus(config_only(tmp_path, **BIG), quantization=name)
    assert "quantised while it is read as fp8" in caught.value.fix


def test_a_quantised_head_is_planned_in_fp8_and_counted_so() -> None:
    """The list of what is plain does not name it: a byte a weight, and its two scales."""
    plain, quantised = (planned(PUBLISHED / name).ledger.weights.head for name in ("modelopt-fp8", "modelopt-head"))
    assert (plain, quantised) == (4 * 48 * 32, 48 * 32 + 4 + 4)


def test_a_quantised_head_that_is_tied_is_refused_by_the_plan_with_the_way_out(tmp_path: Path) -> None:
    """A tied head has no tensors of its own; read as a linear of its own it gives the logits its tool computes."""
    folder = copied("modelopt-head", tmp_path)
    rewrite(folder, tie_word_embeddings=True)
    (issue,) = planned(folder).errors
    assert issue.code == "checkpoint_disagrees"
    assert "lm_head: config.json ties it to the embedding; the checkpoint holds it quantised, as input_scale, " in issue.message
    assert issue.fix.startswith("set tie_word_embeddings to false in config.json")
    rewrite(folder, tie_word_embeddings=False)
    assert error_of(folder) < BOUND


def test_a_plain_copy_of_a_tied_head_is_no_disagreement(tmp_path: Path) -> None:
    """Exports of tied models may hold the table twice."""
    folder = copied("modelopt-fp8", tmp_path)
    rewrite(folder, tie_word_embeddings=True)
    assert not planned(folder).errors


def test_a_list_that_names_a_quantised_head_is_said_by_the_plan(tmp_path: Path) -> None:
    """Before memory is taken: the list says plain, the tensors say FP8."""
    folder = copied("modelopt-head", tmp_path)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite(folder, quantization_config=entry | {"ignore": ["lm_head"]})
    (folder / "hf_quant_config.json").unlink()
    (issue,) = planned(folder).errors
    assert "lm_head: config.json means weight; the checkpoint holds input_scale, weight, weight_scale" in issue.message
