"""Which checkpoints of compressed-tensors (what llm-compressor writes) are read: those with FP8 weights. Free of torch.

config.json describes groups of linears, each with arguments for its weights and for its inputs; formats `float-quantized` and
`naive-quantized` store both alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paddock.axes import FP8_STATIC, FP8_TOKEN, PLAIN
from paddock.errors import ModelConfigError
from paddock.model_config import ConfigReader
from paddock.module_lists import check_compressed, compressed_targets
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.reading import Entry, block_size, entry_of, names_in
from paddock_quant_fp8.schemes import BLOCK, ROW, TENSOR, CompressedFp8, Group, Stored

TOOL = "compressed-tensors"
FORMATS = ("float-quantized", "naive-quantized")
MIXED = "mixed-precision"
# The presets that a group may be named after instead of describing itself.
PRESETS = {
    "FP8": Stored(scales=TENSOR, input_format=FP8_STATIC),
    "FP8_DYNAMIC": Stored(scales=ROW, input_format=FP8_TOKEN),
    "FP8_BLOCK": Stored(scales=BLOCK, input_format=PLAIN, group=128),
}
_KEYS = ("config_groups", "format", "quantization_status", "global_compression_ratio", "version", "producer", "kv_cache_scheme")


def detect(facts: CheckpointFacts) -> CompressedFp8 | None:
    """Return the scheme of a compressed-tensors checkpoint in FP8, else None: integers are left to other formats.

    Raises ModelConfigError for what is FP8 but not supported, by name, and for groups of which only some are FP8.
    """
    found = entry_of(facts, TOOL.__eq__)
    if found is None and not facts.config.get("quantization_config"):
        found = entry_of(facts, TOOL.__eq__, key="compression_config", implied=TOOL)
    if found is None:
        return None
    reader, entry = found
    groups = _groups(reader, entry)
    if groups is None:
        return None
    skipped = names_in(reader, entry, "ignore")
    check_compressed(reader, "ignore", skipped)
    reader.accept(*_KEYS)
    _refuse_unless_empty(reader, entry, "transform_config", "it changes the weights' meaning")
    _refuse_unless_empty(reader, entry, "moe_sparsity_config", "sparse weights are not read")
    sparsity = entry.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise reader.wrong("sparsity_config", dict(sparsity), "empty or of format dense: sparse weights are not read")
    reader.accept("sparsity_config")
    scheme = CompressedFp8(dtype=facts.dtype, groups=groups, skipped=skipped, kv_cache_dtype=_kv(reader, entry))
    reader.finish()
    return scheme


def _groups(reader: ConfigReader, entry: Entry) -> tuple[Group, ...] | None:
    """Return the groups, None when none of them is FP8."""
    listed = entry.get("config_groups")
    if not isinstance(listed, Mapping) or not listed:
        raise reader.wrong("config_groups", listed, "an object with at least one group")
    ours = {name: _is_fp8(name, group) for name, group in listed.items()}
    if not any(ours.values()):
        return None
    bare = [name for name, group in listed.items() if isinstance(group, Mapping) and group.get("weights") is None]
    if bare:
        raise ModelConfigError(
            f"config.json: config_groups {', '.join(bare)} of compressed-tensors quantise no weights",
            fix="use a checkpoint that describes FP8 keys and values as kv_cache_scheme, and leaves attention plain otherwise",
        )
    others = [name for name, is_ours in ours.items() if not is_ours]
    if others:
        raise ModelConfigError(
            f"config.json: config_groups {', '.join(others)} of compressed-tensors are not FP8, the others are",
            fix="use a checkpoint whose quantised linears are all FP8 (float, 8 bits)",
        )
    return tuple(_group(reader, name, group, str(entry.get("format") or FORMATS[0])) for name, group in listed.items())


def _is_fp8(name: str, group: object) -> bool:
    if isinstance(group, list):
        return name.upper() in PRESETS
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return isinstance(weights, Mapping) and (weights.get("num_bits", 8), weights.get("type")) == (8, "float")


def _group(reader: ConfigReader, name: str, group: Any, outer_format: str) -> Group:
    key = f"config_groups.{name}"
    if isinstance(group, list):
        return Group(targets=compressed_targets(reader, key, group), how=PRESETS[name.upper()])
    stored_as = group.get("format") or outer_format
    if stored_as not in FORMATS and not (stored_as == MIXED and group.get("format") is None):
        raise reader.wrong(f"{key}.format", stored_as, f"one of {', '.join(FORMATS)} for FP8 weights")
    if group.get("output_activations") is not None:
        raise reader.wrong(f"{key}.output_activations", group["output_activations"], "null: outputs stay plain")
    targets = compressed_targets(reader, f"{key}.targets", group.get("targets"))
    return Group(targets=targets, how=_stored(reader, key, group["weights"], group.get("input_activations")))


def _stored(reader: ConfigReader, key: str, weights: Entry, inputs: object) -> Stored:
    """Return how a group with these arguments is stored and fed."""
    scales = _weight_scales(reader, f"{key}.weights", weights)
    block = (128, 128)
    if scales == BLOCK:
        block = block_size(reader, f"{key}.weights.block_structure", _sizes(weights.get("block_structure")))
    input_format, group = _inputs(reader, f"{key}.input_activations", inputs)
    if scales == BLOCK and input_format == FP8_STATIC:
        raise reader.wrong(f"{key}.input_activations", inputs, "dynamic or null beside weights scaled by blocks")
    return Stored(scales=scales, input_format=input_format, block=block, group=group)


def _sizes(block: object) -> object:
    """Return a block's sizes: those of the preset where none are given, a list of what older versions wrote as `128x128`."""
    if isinstance(block, str) and re.fullmatch(r"\d{1,5}x\d{1,5}", block, re.ASCII):
        return [int(size) for size in block.split("x")]
    return block or [128, 128]


def _weight_scales(reader: ConfigReader, key: str, weights: Entry) -> str:
    _symmetric(reader, key, weights)
    if weights.get("dynamic"):
        raise reader.wrong(f"{key}.dynamic", weights["dynamic"], "false: weights have stored scales")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    known = {"tensor": TENSOR, "channel": ROW, "block": BLOCK}
    if not isinstance(strategy, str) or strategy not in known:
        raise reader.wrong(f"{key}.strategy", strategy, "tensor, channel or block for FP8 weights")
    return known[strategy]


def _inputs(reader: ConfigReader, key: str, inputs: object) -> tuple[str, int]:
    """Return the input format, and the inputs that share a scale of a token where it is scaled by groups."""
    if inputs is None:
        return PLAIN, 0
    if not isinstance(inputs, Mapping) or (inputs.get("num_bits", 8), inputs.get("type")) != (8, "float"):
        raise reader.wrong(key, inputs, "null (plain inputs) or 8 bits of type float beside FP8 weights")
    _symmetric(reader, key, inputs)
    dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy")
    if dynamic is True and strategy in (None, "token", "tensor"):  # a scale a token is finer than one of all
        return FP8_TOKEN, 0
    if dynamic is True and strategy == "group":
        size = inputs.get("group_size")
        if type(size) is not int or size < 1:
            raise reader.wrong(f"{key}.group_size", size, "a whole number above 0")
        return PLAIN, size
    if dynamic is False and strategy in (None, "tensor"):
        return FP8_STATIC, 0
    raise reader.wrong(key, dict(inputs), "static with strategy tensor, or dynamic with strategy token, tensor or group")


def _symmetric(reader: ConfigReader, key: str, arguments: Entry) -> None:
    if arguments.get("symmetric", True) is not True:
        raise reader.wrong(f"{key}.symmetric", arguments["symmetric"], "true: FP8 has no zero points")


def _kv(reader: ConfigReader, entry: Entry) -> str | None:
    scheme = entry.get("kv_cache_scheme")
    if scheme is None:
        return None
    if not isinstance(scheme, Mapping) or (scheme.get("num_bits", 8), scheme.get("type")) != (8, "float"):
        raise reader.wrong("kv_cache_scheme", scheme, "null, or 8 bits of type float: keys and values are kept in FP8 or plainly")
    if scheme.get("strategy") == "attn_head":
        fix = "strategy tensor: pages have one scale for all heads of a layer, and 'attn_head' has one a head"
        raise reader.wrong("kv_cache_scheme.strategy", "attn_head", fix)
    if scheme.get("strategy") not in (None, "tensor") or scheme.get("dynamic", False) is not False:
        raise reader.wrong("kv_cache_scheme", dict(scheme), "static with strategy tensor: scales are stored in the checkpoint")
    _symmetric(reader, "kv_cache_scheme", scheme)
    return "fp8"


def _refuse_unless_empty(reader: ConfigReader, entry: Entry, key: str, why: str) -> None:
    if entry.get(key):
        raise reader.wrong(key, entry[key], f"absent: {why}")
    reader.accept(key)
