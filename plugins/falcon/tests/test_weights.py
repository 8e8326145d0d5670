from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paddock.axes import HEADS, KV_HEADS, Embedding, Linear, Module, Shard, Vector
from paddock.errors import PlanError
from paddock_falcon.config import parse_config
from paddock_falcon.plugin import paddock_models
from paddock_falcon.weights import weight_table

BIG = {
    "hidden_size": 14848,
    "num_attention_heads": 232,
    "num_hidden_layers": 80,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
}


def _tensors(source: str, module: Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the checkpoint name and shape of every plain tensor of a module."""
    if isinstance(module, Embedding):
        yield f"{source}{module.rows.source}.weight", (module.rows.size, module.width.size)
    elif isinstance(module, Vector):
        for name in ("weight", "bias")[: 1 + module.bias]:
            yield f"{source}{module.source}.{name}", (module.width.size,)
    elif not module.tied_to:
        for part in module.out:
            yield f"{source}{part.source}.weight", (part.size, module.in_size)
            if module.bias:
                yield f"{source}{part.source}.bias", (part.size,)


def test_the_table_names_what_transformers_saves(
    variant: dict[str, Any], reference_model: Callable[[dict[str, Any]], Any]
) -> None:
    """Every tensor of every variant is declared once, with its shape."""
    model = reference_model(variant)
    config = parse_config(json.loads(model.config.to_json_string()))
    declared = [item for _, source, module in weight_table(config).modules() for item in _tensors(source, module)]
    saved = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied:
        del saved["lm_head.weight"]
    assert dict(declared) == saved
    assert len(declared) == len(saved)


def test_a_tied_model_ignores_a_stored_head_and_an_untied_one_does_not() -> None:
    """The 180B files hold `lm_head.weight` beside the embeddings; only a tied model may pass over it."""
    assert "lm_head.weight" in weight_table(parse_config(BIG)).ignored
    assert "lm_head.weight" not in weight_table(parse_config({**BIG, "tie_word_embeddings": False})).ignored


def test_the_largest_model_has_its_published_number_of_parameters() -> None:
    """178,557,088,768 for 180B with a tied head."""
    table = weight_table(parse_config(BIG))
    count = 0
    for _, source, module in table.modules():
        for _, shape in _tensors(source, module):
            count += shape[0] * (shape[1] if len(shape) == 2 else 1)
    assert count == 178_557_088_768


def _layer_linears(raw: dict[str, Any]) -> dict[str, Linear]:
    return {module.name: module for module in weight_table(parse_config(raw)).layer if isinstance(module, Linear)}


def test_tensor_parallel_ranks_take_whole_kv_groups() -> None:
    """Eight ranks of 180B hold 29 query heads, one key and one value head each, and the columns of those 29 heads."""
    shard = Shard(rank=3, world=8, cuts=frozenset({HEADS, KV_HEADS}))
    linears = _layer_linears(BIG)
    assert shard.linear(linears["qkv"]).out_size == (29 + 2) * 64
    assert shard.linear(linears["dense"]).in_size == 29 * 64


def test_ranks_that_do_not_divide_the_groups_are_refused() -> None:
    """Three ranks cannot share eight KV groups."""
    with pytest.raises(PlanError, match="8 kv_heads"):
        Shard(rank=0, world=3, cuts=frozenset({KV_HEADS})).linear(_layer_linears(BIG)["qkv"])


def test_the_descriptors_light_references_import_no_torch() -> None:
    """Planning reads config, weights and attention needs in a process that has not imported torch."""
    (spec,) = paddock_models()
    lines = ["import sys", "from paddock.plugins import resolve", f"config = resolve({spec.parse_config!r})({{}})"]
    lines += [f"resolve({spec.weights!r})(config), resolve({spec.attention!r})(config)", "assert 'torch' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
