"""Descriptions of quantised checkpoints with any value in any place: read, left to others, or refused with the way out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from plugins.quant_awq.tests.written import FORMATS

from paddock.axes import EMBED, FFN, VOCAB, Linear, Part
from paddock.errors import PaddockError
from paddock.plugins import CheckpointFacts, resolve
from paddock_quant_awq.plugin import paddock_quantizations as int4_formats
from paddock_quant_fp8.plugin import paddock_quantizations as fp8_formats
from tests.zoo.formats import WRITTEN

# fmt: off
ANYTHING: list[Any] = [
    None, [], {}, "", 0, -1, True, False, 1.5, "x", [1], {"a": 1}, [[]], [None], math.nan, 10**30, "re:(", ["re:("], ["Linear"],
    {"weights": 5}, {"x": {"bits": 16}}, {"-:(": {}}, [{"a": 1}],
]
MORE_KEYS = (
    "modules_to_not_convert", "dynamic", "extra_config", "modules_in_block_to_quantize", "checkpoint_format", "lm_head",
    "block_name_to_quantize", "kv_cache_scheme", "kv_cache_quant_algo", "sparsity_config", "transform_config", "ignore",
    "exclude_modules", "weight_block_size", "activation_scale_ub", "quant_algo", "config_groups", "desc_act", "group_size",
)
# fmt: on
ENTRIES = {name: form.entry(32) for name, form in FORMATS.items()} | {name: made.entry for name, made in WRITTEN.items()}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "modelopt fp8": ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}),
    "modelopt kv": ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}),
    "modelopt awq": ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}}),
    "awq": ("quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
    "gptq": ("quantize_config.json", {"bits": 4, "group_size": 64}),
}
DETECTORS = tuple(resolve(spec.detect) for spec in (*int4_formats(), *fp8_formats()))
EMB = Part("embed", EMBED, 256)
LAYERS = Linear("gate_up", (Part("gate", FFN, 64, source="gate"), Part("up", FFN, 64, source="up")), EMB)
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 64, source="lm_head"),), EMB)


def places(entry: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path to every value of an object."""
    for key, value in entry.items():
        yield (*before, key)
        if isinstance(value, Mapping):
            yield from places(value, (*before, key))


def spoilt(entry: Mapping[str, Any], *more: str) -> Iterator[dict[str, Any]]:
    """Yield the object with any value in any place, one at a time, and under keys that it does not have."""
    for path in (*places(entry), *((key,) for key in more)):
        for value in ANYTHING:
            made = copy.deepcopy(dict(entry))
            place = made
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield made


def read(facts: CheckpointFacts) -> int:
    """Return how many formats read a description to the last tensor; anything but an error of ours with a way out fails."""
    count, dead_ends = 0, list[str]()
    for detect in DETECTORS:
        try:
            scheme = detect(facts)
            if scheme is not None:
                scheme.tensors("model.layers.0.gate", LAYERS)
                scheme.tensors("lm_head", HEAD)
                count += 1
        except PaddockError as error:
            dead_ends += [] if error.fix else [error.message]
    assert not dead_ends
    return count


@pytest.mark.parametrize("name", ENTRIES)
def test_config_json_may_hold_anything(name: str) -> None:
    """Of no value does Python's own error reach the user, and no two formats read the same."""
    config = {"torch_dtype": "float32"}
    assert read(CheckpointFacts(config=config | {"quantization_config": ENTRIES[name]}, dtype="float32")) == 1
    for entry in spoilt(ENTRIES[name], *MORE_KEYS):
        for key in ("quantization_config", "compression_config"):
            assert read(CheckpointFacts(config=config | {key: entry}, dtype="float32")) <= 1


@pytest.mark.parametrize("name", FILES)
def test_files_beside_it_may_hold_anything(name: str) -> None:
    """Those that older tools write."""
    file, content = FILES[name]
    assert read(CheckpointFacts(config={}, files={file: content}, dtype="float32")) == 1
    for made in spoilt(content, *MORE_KEYS):
        assert read(CheckpointFacts(config={}, files={file: made}, dtype="float32")) <= 1
