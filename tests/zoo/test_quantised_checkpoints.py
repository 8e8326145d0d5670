"""Quantised models from files: every format with every family, against plain arithmetic on the dequantised weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock import axes
from paddock.checkpoint.load import load
from paddock.errors import CheckpointError
from paddock.layers import (
    Activation,
    Builder,
    Communicator,
    LinearLayer,
    LinearMethod,
    Ops,
    finalise,
    reference_attention,
    targets,
)
from paddock.layers.attention_layer import Attention
from paddock.layers.unquantized import PlainMethod
from paddock.planning import kv_scales
from paddock.plugins import CheckpointFacts, ModelSpec, resolve
from paddock.testing.contracts import BuiltModel, build_model, checkpoint
from paddock.testing.oracle import relative_rms
from paddock_falcon.plugin import paddock_models as falcon
from paddock_llama.plugin import paddock_models as llama
from paddock_quant_awq.plugin import paddock_quantizations as awq
from paddock_quant_fp8.plugin import paddock_quantizations as fp8
from tests.zoo.formats import WRITTEN, Written

# One FP8 rounding that falls the other way shifts one number by a sixteenth; a wrong scale, order or zero point shifts them all.
BOUND = 2e-3
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"num_hidden_layers": 2, "vocab_size": 62, "max_position_embeddings": 64}
GROUPED = {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
GROUPED |= {"num_hidden_layers": 2, "vocab_size": 62, "max_position_embeddings": 64}
SERIAL = GROUPED | {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
SERIAL |= {"num_kv_heads": 4}
(LLAMA_SPEC,), (FALCON_SPEC,) = llama(), falcon()
FAMILIES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "llama": (LLAMA_SPEC, LLAMA),
    "falcon-40b": (FALCON_SPEC, GROUPED),
    "falcon-rw": (FALCON_SPEC, SERIAL),
}
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 62, (23,), generator=torch.Generator().manual_seed(2)).tolist()


class Seen(PlainMethod):
    """A plain linear that first rounds its input as a format does."""

    def __init__(self, written: Written, tensors: tuple[axes.Tensor, ...], pieces: int = 1) -> None:
        """Round by `written`, each of `pieces` of the input by itself."""
        super().__init__(tensors)
        self.written, self.pieces = written, pieces

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T for the rounded x."""
        assert isinstance(x_TI, Tensor)
        return super().apply(layer, torch.cat([self.written.see(part_TI) for part_TI in x_TI.chunk(self.pieces, dim=-1)], dim=-1))


def is_plain(name: str, spared: str = "-") -> bool:
    """Return whether a checkpoint tensor is left as it is: not a linear's weight, the head's, or in a spared module."""
    linear = name.endswith(("proj.weight", "query_key_value.weight", "dense.weight", "4h.weight", "to_h.weight"))
    return not linear or spared in name


def written_to(folder: Path, family: str, written: Written, spared: str = "-") -> dict[str, Tensor]:
    """Write a quantised checkpoint of random weights; return the plain one it stands for."""
    spec, raw = FAMILIES[family]
    files: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in checkpoint(build_model(spec, raw, seed=4).model).items():
        if name.endswith("_scale"):
            continue
        if is_plain(name, spared):
            files[name] = meant[name] = tensor
        else:
            stored, meant[name] = written.store(tensor)
            files |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in stored.items()}
    save_file(files, folder / "model.safetensors")
    return meant


def loaded(
    folder: Path,
    family: str,
    entry: dict[str, Any],
    shard: axes.Shard = axes.WHOLE,
    communicator: Communicator | None = None,
) -> BuiltModel:
    """Return a rank's share of the model of a config.json with this quantisation entry, filled from the folder."""
    spec, raw = FAMILIES[family]
    facts = CheckpointFacts(config=raw | {"quantization_config": entry}, dtype="float32")
    schemes = [(found, resolve(found.detect)(facts)) for found in (*awq(), *fp8())]
    ((method, scheme),) = [(resolve(found.method), scheme) for found, scheme in schemes if scheme is not None]
    config = resolve(spec.parse_config)(facts.config, ())
    table, needs = resolve(spec.weights)(config), resolve(spec.attention)(config)
    builder = Builder(
        table,
        method_for=partial(method, scheme),
        ops=Ops(),
        backend=reference_attention.create(needs, CPU),
        dtype=torch.float32,
        device=CPU,
        max_model_len=64,
        shard=shard,
        communicator=communicator,
    )
    model = resolve(spec.build)(config, builder)
    load(folder, targets(model), ignored_suffixes=(*table.ignored, *kv_scales.UNREAD))
    finalise(model)
    return BuiltModel(
        config=config,
        table=table,
        needs=needs,
        model=model,
        backend=builder.backend,
        dtype=torch.float32,
        num_layers=table.num_layers,
    )


def plain(family: str, written: Written, meant: dict[str, Tensor], spared: str = "-", ranks: int = 1) -> BuiltModel:
    """Return the dequantised model, its linears rounding their inputs as the format does on each of `ranks`."""
    spec, raw = FAMILIES[family]

    def method_for(path: str, linear: axes.Linear) -> LinearMethod:
        tensors = axes.Unquantized("float32").tensors(path, linear)
        pieces = 1 if linear.inp.axis == axes.EMBED else ranks
        return PlainMethod(tensors) if is_plain(f"{path}.weight", spared) else Seen(written, tensors, pieces)

    return build_model(spec, raw, method_for=method_for, state=meant)


def logits(built: BuiltModel) -> Tensor:
    """Return logits of a prompt and of two tokens after it."""
    return built.run([("a", TOKENS[:-2])], [("a", TOKENS[-2:-1])], [("a", TOKENS[-1:])])["a"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_quantised_checkpoint_gives_the_logits_of_what_it_stands_for(tmp_path: Path, family: str, name: str) -> None:
    """Files written by the letter of the format load strictly and compute what plain arithmetic on their meaning does."""
    meant = written_to(tmp_path, family, WRITTEN[name])
    built = loaded(tmp_path, family, WRITTEN[name].entry)
    assert relative_rms(logits(built), logits(plain(family, WRITTEN[name], meant))) < BOUND


@pytest.mark.parametrize("name", WRITTEN)
def test_modules_a_list_spares_are_read_plain(tmp_path: Path, name: str) -> None:
    """The official recipe in miniature: the first layer is plain, the second is not."""
    spared, written = "model.layers.0.", WRITTEN[name]
    meant = written_to(tmp_path, "llama", written, spared)
    built = loaded(tmp_path, "llama", written.entry | {written.list_key: [written.first_layer, "lm_head"]})
    assert relative_rms(logits(built), logits(plain("llama", written, meant, spared))) < BOUND


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_contradict_the_list_are_refused(tmp_path: Path, name: str) -> None:
    """Quantised tensors of a module the list calls plain are unexpected; nothing is guessed."""
    written = WRITTEN[name]
    written_to(tmp_path, "llama", written)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.\w+'?: unexpected"):
        loaded(tmp_path, "llama", written.entry | {written.list_key: [written.first_layer, "lm_head"]})


def test_scales_of_blocks_may_have_axes_of_one(tmp_path: Path) -> None:
    """ModelOpt stores them [rows of blocks, 1, columns of blocks, 1]: the same numbers in the same order."""
    written = WRITTEN["compressed-block"]
    meant = written_to(tmp_path, "llama", written)
    stored = load_file(tmp_path / "model.safetensors")
    wide = {name: tensor[:, None, :, None] for name, tensor in stored.items() if name.endswith("weight_scale")}
    save_file(stored | wide, tmp_path / "model.safetensors")
    built = loaded(tmp_path, "llama", written.entry)
    assert relative_rms(logits(built), logits(plain("llama", written, meant))) < BOUND


@pytest.mark.parametrize("family", ["llama", "falcon-40b"])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"k_scale": 0.5, "v_scale": 2.0}, (0.5, 2.0)),
        ({"k_proj.k_scale": 0.5, "v_proj.v_scale": 2.0}, (0.5, 2.0)),
        ({"qkv_proj.k_scale": 0.5, "qkv_proj.v_scale": 2.0}, (0.5, 2.0)),
        ({"k_proj.output_scale": 0.5, "v_proj.output_scale": 2.0}, (0.5, 2.0)),
        ({"k_scale": 0.5, "v_scale": 2.0, "k_zero_point": 0.0, "v_zero_point": 0.0, "q_scale": 3.0}, (0.5, 2.0)),
        ({"attn.k_scale": 0.5, "attn.v_scale": 2.0, "attn.q_scale": 3.0, "attn.prob_scale": 1.0}, (0.5, 2.0)),
        ({f"{kind}_proj.output_scale": scale for kind, scale in (("q", 3.0), ("k", 0.5), ("v", 2.0))}, (0.5, 2.0)),
        ({"k_scale": 0.5, "v_scale": 2.0, "prob_output_scale": 1.0}, (0.5, 2.0)),
        ({"kv_scale": 0.25}, (0.25, 0.25)),
        ({}, (1.0, 1.0)),
    ],
)
def test_static_kv_scales_are_read_under_every_name(
    tmp_path: Path, family: str, stored: dict[str, float], expected: tuple[float, float]
) -> None:
    """Scales of the KV pages come from the checkpoint, from one for both where it has no more, and are 1 where it has none."""
    written_to(tmp_path, family, WRITTEN["fp8-static"])
    prefix = {"llama": "model.layers.1.self_attn", "falcon-40b": "transformer.h.1.self_attention"}[family]
    scales = {f"{prefix}.{name}": torch.tensor([value]) for name, value in stored.items()}
    save_file(load_file(tmp_path / "model.safetensors") | scales, tmp_path / "model.safetensors")
    built = loaded(tmp_path, family, WRITTEN["fp8-static"].entry | {"kv_cache_scheme": "static"})
    attention = [module for module in built.model.modules() if isinstance(module, Attention)]
    assert [(a.k_scale.item(), a.v_scale.item()) for a in attention] == [(1.0, 1.0), expected]
