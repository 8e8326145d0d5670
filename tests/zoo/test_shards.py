"""Every format over ranks: what a rank reads of the files of a linear means its slice of what the whole means, to the bit.

O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from plugins.quant_awq.tests.written import FORMATS
from safetensors.torch import save_file
from torch import Tensor

from paddock import axes
from paddock.axes import EMBED, FFN, HEADS, KV_HEADS, VOCAB, Linear, Part, Shard
from paddock.checkpoint.index import stored_tensors
from paddock.checkpoint.matching import match
from paddock.checkpoint.reading import read as fill
from paddock.errors import PlanError
from paddock.layers import LinearLayer
from paddock.planning import rebuild
from paddock.plugins import CheckpointFacts, QuantizationSpec, resolve
from paddock_quant_awq.plugin import paddock_quantizations as int4_formats
from paddock_quant_fp8.plugin import paddock_quantizations as fp8_formats
from tests.zoo.formats import WRITTEN, Stored, Written, store_blocks, store_half_rows
from tests.zoo.test_published_fp8 import NAMES, PUBLISHED, planned

CUTS, CPU = frozenset({HEADS, KV_HEADS, FFN, VOCAB}), torch.device("cpu")
# Of four ranks two share a KV head; a share is whole blocks of 128 by 128, and whole groups of 128.
QKV = Linear(
    "qkv",
    (Part("q", HEADS, 4, 128, "q"), Part("k", KV_HEADS, 2, 128, "k"), Part("v", KV_HEADS, 2, 128, "v")),
    Part("embed", EMBED, 256),
    bias=True,
)
GATE_UP = Linear("gate_up", (Part("gate", FFN, 512, source="gate"), Part("up", FFN, 512, source="up")), Part("embed", EMBED, 256))
DOWN = Linear("down", (Part("down", EMBED, 256, source="down"),), Part("ffn", FFN, 512))
LINEARS = {linear.name: linear for linear in (QKV, GATE_UP, DOWN)}
EIGHT = {"num_bits": 8, "type": "float", "symmetric": True}


@frozen(kw_only=True)
class Format:
    """The entry of config.json, and what it makes of a weight [O, I]: its tensors, and what they mean."""

    entry: dict[str, Any]
    store: Callable[[Tensor], tuple[Stored, Tensor]]


def blocks(name: str) -> Callable[[Tensor], tuple[Stored, Tensor]]:
    """Return what stores a weight in blocks of 128 by 128, their scales called `name`."""
    return lambda weight_OI: store_blocks(weight_OI, (128, 128), name)


def compressed_blocks() -> dict[str, Any]:
    """Return an entry as the preset FP8_BLOCK writes it."""
    weights = EIGHT | {"strategy": "block", "block_structure": [128, 128]}
    inputs = EIGHT | {"strategy": "group", "group_size": 128, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def written(found: Written) -> Format:
    """Return a format of the tests of whole models."""
    return Format(entry=found.entry, store=found.store)


def int4(name: str, group: int) -> Format:
    """Return a format of 4-bit integers with a group size."""
    return Format(entry=FORMATS[name].entry(group), store=lambda weight_OI: FORMATS[name].store(weight_OI, group))


OF_NO_BLOCKS = [name for name in WRITTEN if not name.startswith("awq") and "block" not in name]
ALL = {
    **{name: written(WRITTEN[name]) for name in OF_NO_BLOCKS},
    "modelopt-channel": Format(
        entry={"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, store=store_half_rows
    ),
    "modelopt-block": Format(entry={"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, store=blocks("weight_scale")),
    "fp8-block": Format(entry=WRITTEN["fp8-block"].entry | {"weight_block_size": [128, 128]}, store=blocks("weight_scale_inv")),
    "compressed-block": Format(entry=compressed_blocks(), store=blocks("weight_scale")),
    **{f"{name} {group}": int4(name, group) for name in FORMATS for group in (128, -1)},
}


def spec_and_scheme(entry: dict[str, Any]) -> tuple[QuantizationSpec, Any]:
    """Return the one installed format that recognises an entry, and its scheme."""
    facts = CheckpointFacts(config={"quantization_config": entry, "torch_dtype": "float32"}, dtype="float32")
    found = [(spec, resolve(spec.detect)(facts)) for spec in (*fp8_formats(), *int4_formats())]
    ((spec, scheme),) = [(spec, scheme) for spec, scheme in found if scheme is not None]
    return spec, scheme


def write(folder: Path, linear: Linear, store: Callable[[Tensor], tuple[Stored, Tensor]]) -> Tensor:
    """Write the tensors of every part of a linear into a folder; return what they mean, parts fused."""
    generator, stored, meant = torch.Generator().manual_seed(7), dict[str, Tensor](), []
    for part in linear.out:
        tensors, meaning_OI = store(torch.randn(part.size, linear.in_size, generator=generator) * 0.1)
        stored |= {f"{part.source}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        if linear.bias:
            stored[f"{part.source}.bias"] = torch.randn(part.size, generator=generator)
        meant.append(meaning_OI)
    save_file(stored, folder / "model.safetensors")
    return torch.cat(meant)


def read(folder: Path, linear: Linear, entry: dict[str, Any], shard: Shard = axes.WHOLE, scope: str = "") -> LinearLayer:
    """Return a rank's share of a linear, loaded from the folder: all that there is of it must be used."""
    spec, scheme = spec_and_scheme(entry)
    method = resolve(spec.method)(scheme, scope + linear.out[0].source, linear)
    layer = LinearLayer(linear, method, torch.float32, CPU, shard=shard, source=scope)
    prefixes = tuple(f"{scope}{part.source}." for part in linear.out)
    stored = {name: tensor for name, tensor in stored_tensors(folder).items() if name.startswith(prefixes)}
    scales = (".k_scale", ".v_scale")  # of keys and values, which stand beside a projection and are none of it
    fill(match(stored, layer.targets(), ignored_suffixes=scales, source=folder), None)
    layer.finalise()
    return layer


def share(whole: Tensor, linear: Linear, shard: Shard) -> Tensor:
    """Return the rows of each part that a rank holds, of a weight its columns too."""
    offset, rows = 0, []
    for part in linear.out:
        start, stop = shard.span(part)
        rows.append(whole[offset + start : offset + stop])
        offset += part.size
    return torch.cat(rows)[..., slice(*shard.span(linear.inp))] if whole.ndim == 2 else torch.cat(rows)


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS)
@pytest.mark.parametrize("name", ALL)
def test_a_rank_reads_its_slice_of_the_whole(tmp_path: Path, name: str, linear: Linear) -> None:
    """Of two ranks and of four: weights, input scales and biases, in rows and in columns, KV heads that ranks share included."""
    meant_OI = write(tmp_path, linear, ALL[name].store)
    whole = read(tmp_path, linear, ALL[name].entry)
    assert torch.equal(whole.method.dequantise(whole), meant_OI)
    for world in (2, 4):
        for rank in range(world):
            shard = Shard(rank, world, CUTS)
            if name.startswith("gptq-ordered") and linear is DOWN and not name.endswith("-1"):
                with pytest.raises(PlanError, match="do not fall on the groups"):  # groups with an order of their own stay whole
                    read(tmp_path, linear, ALL[name].entry, shard)
                continue
            layer = read(tmp_path, linear, ALL[name].entry, shard)
            assert torch.equal(layer.method.dequantise(layer), share(meant_OI, linear, shard))
            assert layer.method.input_scale(layer) == whole.method.input_scale(whole)
            if linear.bias:
                assert torch.equal(layer.get_parameter("bias"), share(whole.get_parameter("bias"), linear, shard))


@pytest.mark.parametrize("name", [name for name in NAMES if "block" not in name])
def test_a_rank_reads_its_slice_of_what_a_tool_wrote(name: str) -> None:
    """Every linear of the published tiny Llamas, whose blocks alone cannot be cut: one covers a whole weight."""
    folder = PUBLISHED / name
    made = planned(folder)
    entry = made.model_config["quantization_config"]
    for _, scope, linear in rebuild.weight_table(made).modules():
        if not isinstance(linear, Linear):
            continue
        whole = read(folder, linear, entry, scope=scope)
        for world in (2, 4):
            for rank in range(world):
                shard = Shard(rank, world, CUTS)
                layer = read(folder, linear, entry, shard, scope)
                expected = share(whole.method.dequantise(whole), linear, shard)
                assert torch.equal(layer.method.dequantise(layer), expected)
                assert layer.method.input_scale(layer) == whole.method.input_scale(whole)
