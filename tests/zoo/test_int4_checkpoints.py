"""4-bit models from files: every format with every family, whole and over ranks, against arithmetic on what it stands for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.made import scheme_of
from plugins.quant_awq.tests.written import FORMATS, Format
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock import axes
from paddock.errors import CheckpointError
from paddock.layers import Communicator
from paddock.planning.weights import straddling_groups
from paddock.plugins import CheckpointFacts, resolve
from paddock.testing.contracts import MODEL_BOUND, build_model, checkpoint
from paddock.testing.oracle import relative_rms
from paddock.testing.paging import step
from paddock.testing.ranks import run_ranks
from paddock_quant_awq.plugin import paddock_quantizations
from tests.zoo.formats import Written, see_token
from tests.zoo.test_quantised_checkpoints import (
    BOUND,
    FALCON_SPEC,
    FAMILIES,
    TOKENS,
    is_plain,
    loaded,
    logits,
    plain,
    written_to,
)

GROUP = 16
CUTS = frozenset({axes.HEADS, axes.KV_HEADS, axes.FFN, axes.VOCAB})
# Falcon-180B in miniature: eight KV groups, and as many inputs of `dense` a group as make one and a half groups of 64.
STRADDLING = {"hidden_size": 768, "num_attention_heads": 16, "num_kv_heads": 8, "new_decoder_architecture": True}
STRADDLING |= {"ffn_hidden_size": 1024, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64}


def written(format_: Format, group: int = GROUP) -> Written:
    """Return a format as the zoo writes checkpoints."""
    return Written(
        entry=format_.entry(group),
        store=lambda weight_OI: format_.store(weight_OI, group),
        see=see_token if format_.fp8 else lambda x_TI: x_TI,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_4_bit_checkpoint_gives_the_logits_of_what_it_stands_for(tmp_path: Path, family: str, name: str) -> None:
    """Files written by the letter of the format load strictly and compute what plain arithmetic on their meaning does."""
    meant = written_to(tmp_path, family, written(FORMATS[name]))
    built = loaded(tmp_path, family, FORMATS[name].entry(GROUP))
    assert relative_rms(logits(built), logits(plain(family, written(FORMATS[name]), meant))) < BOUND


@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("name", ["awq", "gptq", "packed-asymmetric", "modelopt"])
def test_other_group_sizes_load_too(tmp_path: Path, name: str, group: int) -> None:
    """Small groups, and one for a whole row."""
    meant = written_to(tmp_path, "llama", written(FORMATS[name], group))
    built = loaded(tmp_path, "llama", FORMATS[name].entry(group))
    assert relative_rms(logits(built), logits(plain("llama", written(FORMATS[name], group), meant))) < BOUND


@pytest.mark.parametrize("with_scales", [True, False])
def test_falcon_with_and_without_a_scaled_activation(tmp_path: Path, with_scales: bool) -> None:
    """AutoAWQ's `mlp.act.scales` divide what the GELU gives; folding them back into the weight gives the same logits."""
    meant = written_to(tmp_path, "falcon-40b", written(FORMATS["awq"]))
    files = load_file(tmp_path / "model.safetensors")
    if with_scales:
        for i in range(2):
            down = f"transformer.h.{i}.mlp.dense_4h_to_h.weight"
            scales_F = torch.linspace(0.5, 3, meant[down].shape[1])
            files[f"transformer.h.{i}.mlp.act.scales"] = scales_F.half()
            meant[down] = meant[down] / scales_F.half().float()
        save_file(files, tmp_path / "model.safetensors")
    built = loaded(tmp_path, "falcon-40b", FORMATS["awq"].entry(GROUP))
    assert relative_rms(logits(built), logits(plain("falcon-40b", written(FORMATS["awq"]), meant))) < BOUND


def test_modelopts_factors_are_read_where_they_are(tmp_path: Path) -> None:
    """o_proj and down_proj keep a pre_quant_scale, which the exporter folds into a norm elsewhere."""
    meant = written_to(tmp_path, "llama", written(FORMATS["modelopt"]))
    files = load_file(tmp_path / "model.safetensors")
    for name in [name for name in meant if name.endswith(("o_proj.weight", "down_proj.weight"))]:
        factor_I = torch.linspace(0.5, 2, meant[name].shape[1])
        files[f"{name.removesuffix('weight')}pre_quant_scale"] = factor_I
        meant[name] = meant[name] * factor_I
    save_file(files, tmp_path / "model.safetensors")
    built = loaded(tmp_path, "llama", FORMATS["modelopt"].entry(GROUP))
    assert relative_rms(logits(built), logits(plain("llama", written(FORMATS["modelopt"]), meant))) < BOUND


def rank_logits(
    scheme: Any, method: Any, state: dict[str, Tensor], world: int, rank: int, communicator: Communicator | None
) -> Tensor:
    """Return the logits of one rank of a model in the straddling shape."""
    shard = axes.Shard(rank, world, CUTS) if world > 1 else axes.WHOLE
    built = build_model(
        FALCON_SPEC, STRADDLING, shard=shard, communicator=communicator, state=state, method_for=partial(method, scheme)
    )
    kv_heads = shard.part(axes.Part("kv", axes.KV_HEADS, built.needs.num_kv_heads)).size
    (found,) = step(built.model, built.pages(kv_heads=kv_heads), built.backend, [("a", TOKENS)])
    return found


@pytest.mark.parametrize("name", ["awq", "packed", "gptq", "modelopt"])
def test_eight_ranks_whose_borders_slice_groups_give_the_logits_of_one(name: str) -> None:
    """Falcon with 1.5 groups a rank in `dense`: groups are sliced by their place in the whole."""
    format_, state = FORMATS[name], {}
    for key, tensor in checkpoint(build_model(FALCON_SPEC, STRADDLING, seed=4, finalised=False).model).items():
        if key.endswith("_scale") or is_plain(key):
            state[key] = tensor
        else:
            stored, _ = format_.store(tensor, 64)
            state |= {f"{key.removesuffix('weight')}{suffix}": part for suffix, part in stored.items()}
    facts = CheckpointFacts(config={"quantization_config": format_.entry(64)}, dtype="float32")
    found = [(spec, resolve(spec.detect)(facts)) for spec in paddock_quantizations()]
    ((spec, scheme),) = [(spec, scheme) for spec, scheme in found if scheme is not None]
    work = partial(rank_logits, scheme, resolve(spec.method), state)
    whole = work(1, 0, None)
    for logits_TV in run_ranks(8, partial(work, 8)):
        assert relative_rms(logits_TV, whole) < MODEL_BOUND


@pytest.mark.parametrize(
    ("name", "group", "world", "says"),
    [("gptq-ordered", 64, 2, "0.5 groups of 384"), ("awq", 48, 16, "0.5 groups of 48"), ("awq", 64, 24, "0.5 groups of 32")],
)
def test_a_plan_that_would_break_a_group_is_refused(name: str, group: int, world: int, says: str) -> None:
    """Planning knows from the declaration what loading would refuse; where groups can be sliced it has nothing to say."""
    down = axes.Linear("down", (axes.Part("down", axes.EMBED, 16, source="down"),), axes.Part("ffn", axes.FFN, 384))
    table = axes.WeightTable(outer=(down,), layer=(), num_layers=0)

    def problems(world: int) -> list[str]:
        tensors = {"down": scheme_of(FORMATS[name].entry(group)).tensors("down", down)}
        return list(straddling_groups(table, tensors, axes.Shard(0, world, CUTS)))

    (problem,) = problems(world)
    assert says in problem
    assert not problems(1 if name == "gptq-ordered" else 4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_head_or_an_embedding_nobody_declared_is_refused(tmp_path: Path, name: str) -> None:
    """Its tensors are unexpected and the plain ones missing; the error names both."""
    written_to(tmp_path, "llama", written(FORMATS[name]))
    files = load_file(tmp_path / "model.safetensors")
    for module in ("lm_head", "model.embed_tokens"):
        rows_VE = files.pop(f"{module}.weight")[:56]
        files |= {f"{module}.{suffix}": tensor for suffix, tensor in FORMATS[name].store(rows_VE, GROUP)[0].items()}
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        loaded(tmp_path, "llama", FORMATS[name].entry(GROUP))
    for module in ("lm_head", "model.embed_tokens"):
        assert f"'{module}.weight'" in error.value.message
        assert any(f"'{module}.{suffix}': unexpected" in error.value.message for suffix in ("qweight", "weight_scale"))
    assert "config.json" in error.value.fix


@pytest.mark.parametrize(
    ("name", "tensor", "change", "says"),
    [
        ("awq", "qweight", lambda x: x.to(torch.int16), "is I16"),
        ("awq", "qweight", lambda x: x.T.contiguous(), "the model wants I32"),
        ("gptq", "qzeros", lambda x: x.float(), "is F32"),
        ("packed", "weight_packed", lambda x: x[:, :1].contiguous(), "the model wants I32"),
        ("modelopt", "weight", lambda x: x.to(torch.int8), "is I8"),
        ("unpacked", "weight_scale", lambda x: x[:, :1].contiguous(), "has shape"),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_is_refused(tmp_path: Path, name: str, tensor: str, change: Any, says: str) -> None:
    """llm-awq's int16 words, transposed or cut tensors: the error has what is there and what should be."""
    written_to(tmp_path, "llama", written(FORMATS[name]))
    files = load_file(tmp_path / "model.safetensors")
    key = f"model.layers.1.mlp.down_proj.{tensor}"
    save_file(files | {key: change(files[key])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{key}'?: ") as error:
        loaded(tmp_path, "llama", FORMATS[name].entry(GROUP))
    assert says in error.value.message
