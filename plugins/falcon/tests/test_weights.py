from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paddock.axes import FFN, HEADS, KV_HEADS, Embedding, Linear, Module, Shard, Vector
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
RW = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50304}
RW = {**RW, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}


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


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, 6_921_720_704),
        (BIG, 178_557_088_768),
        (BIG | {"tie_word_embeddings": False}, 179_522_565_120),
        (RW, 1_311_625_216),
    ],
    ids=["7b", "180b", "180b-untied", "rw-1b"],
)
def test_published_models_have_their_published_number_of_parameters(raw: dict[str, Any], expected: int) -> None:
    """The weight table declares them, biases and norms included."""
    modules = weight_table(parse_config(raw)).modules()
    shapes = [shape for _, source, module in modules for _, shape in _tensors(source, module)]
    assert sum(map(math.prod, shapes)) == expected


def _layer_linears(raw: dict[str, Any]) -> dict[str, Linear]:
    return {module.name: module for module in weight_table(parse_config(raw)).layer if isinstance(module, Linear)}


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("raw", [BIG, RW], ids=["180b", "rw-1b"])
def test_tensor_parallel_ranks_take_whole_kv_groups(raw: dict[str, Any], world: int) -> None:
    """Rows of the fused projection and the columns of `dense` fall into whole groups."""
    config, linears = parse_config(raw), _layer_linears(raw)
    (qkv,), heads = linears["qkv"].out, linears["dense"].inp
    group, queries = (config.heads_per_group + 2) * config.head_dim, config.heads_per_group * config.head_dim
    for rank in range(world):
        shard = Shard(rank, world, frozenset({HEADS, KV_HEADS}))
        (start, stop), columns = shard.span(qkv), shard.span(heads)
        first, last = rank * config.num_kv_heads // world, (rank + 1) * config.num_kv_heads // world
        assert (start, stop) == (first * group, last * group)
        assert columns == (first * queries, last * queries)
        assert shard.linear(linears["qkv"]).bias is config.bias  # as long as the rows, and cut with them


def test_eight_ranks_of_the_180b_hold_29_query_heads_and_one_kv_head_each() -> None:
    """(29 + 2) x 64 rows, and the columns of 29 heads."""
    shard, linears = Shard(3, 8, frozenset({KV_HEADS})), _layer_linears(BIG)
    assert shard.linear(linears["qkv"]).out_size == (29 + 2) * 64
    assert shard.linear(linears["dense"]).in_size == 29 * 64


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_of_the_7b_hold_its_one_group_whole(world: int) -> None:
    """71 query heads and one KV head are one group: no rank gets a part of it, and nothing is summed."""
    linears = _layer_linears({})
    for rank in range(world):
        shard = Shard(rank, world, frozenset({HEADS, KV_HEADS, FFN}))
        assert shard.span(linears["qkv"].out[0]) == (0, (71 + 2) * 64)
        assert shard.span(linears["dense"].inp) == (0, 71 * 64)
        assert shard.span(linears["up"].out[0]) == (rank * 18176 // world, (rank + 1) * 18176 // world)


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
