"""What each format says of itself in config.json, and beside it. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from paddock_quant_awq.recipes.chosen import AUTOAWQ, COMPRESSED, W4A8, Chosen

Files = Mapping[str, Mapping[str, Any]]
_PACKED = "pack-quantized"


def description(chosen: Chosen, config: Mapping[str, Any], heads: tuple[str, ...]) -> Files:
    """Return the JSON files of a model whose config.json was `config` and whose linears `heads` stay plain."""
    if chosen.format == AUTOAWQ:
        return {"config.json": {**config, "quantization_config": _autoawq(chosen)}}
    if chosen.format == COMPRESSED:
        return {"config.json": {**config, "quantization_config": _compressed(chosen, heads)}}
    return _modelopt(chosen, config, heads)


def _autoawq(chosen: Chosen) -> dict[str, Any]:
    """Return AutoAWQ's section; it never quantises heads, and lists none."""
    size = chosen.group_size
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def _compressed(chosen: Chosen, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return compressed-tensors' section; the format is named in it twice, for its own guess for w4a8 would be another."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": not chosen.zero_points,
        "strategy": "group",
        "group_size": chosen.group_size,
        "dynamic": False,
    }
    token = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": token if chosen.scheme == W4A8 else None,
        "output_activations": None,
        "format": _PACKED,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _PACKED,
        "quantization_status": "compressed",
        "ignore": list(heads),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": group},
    }


def _modelopt(chosen: Chosen, config: Mapping[str, Any], heads: tuple[str, ...]) -> Files:
    """Return both files; `producer` says `modelopt`, as readers of the layout ask before they take it, with Paddock's version."""
    algorithm = "W4A8_AWQ" if chosen.scheme == W4A8 else "W4A16_AWQ"
    producer = {"name": "modelopt", "version": f"paddock {version('paddock')}"}
    common = {"quant_algo": algorithm, "group_size": chosen.group_size, "has_zero_point": False, "pre_quant_scale": True}
    newer = {"quant_method": "modelopt", **common, "ignore": list(heads), "producer": producer}
    older = {"producer": producer, "quantization": {**common, "kv_cache_quant_algo": None, "exclude_modules": list(heads)}}
    return {"config.json": {**config, "quantization_config": newer}, "hf_quant_config.json": older}
