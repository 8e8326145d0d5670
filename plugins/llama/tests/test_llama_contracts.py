"""Llama keeps every contract of a model plugin."""

from __future__ import annotations

from typing import Any

import pytest

from paddock.testing.contracts import build_model, check_model, check_tensor_parallel, check_wanted
from paddock_llama.plugin import paddock_models

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "head_dim": 12},
        {"num_hidden_layers": 3, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=["gqa", "tied", "biases", "mqa", "odd_layers"],
)
def test_llama_keeps_the_model_contracts(changes: dict[str, Any]) -> None:
    """Chunking, batching, permuting, sharding and loading change no logits."""
    (spec,) = paddock_models()
    check_model(spec, TINY | changes)


def test_kv_heads_fewer_than_ranks_are_shared() -> None:
    """Four ranks on two KV heads, each head held twice, give the logits of one."""
    (spec,) = paddock_models()
    check_tensor_parallel(spec, TINY, world=4)


def test_the_last_layer_computes_what_is_wanted_alone() -> None:
    """Behind its attention; the layers before it need every token."""
    (spec,) = paddock_models()
    built, seen = build_model(spec, TINY), list[tuple[str, int]]()
    for name, module in built.model.named_modules():
        if name.rpartition(".")[2] in ("qkv", "o", "down"):
            module.register_forward_hook(lambda _module, given, _out, name=name: seen.append((name, len(given[0]))))
    check_wanted(built)
    all_of_them, of_three = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert {count for _, count in all_of_them} == {29}
    last = {"layers.1.o", "layers.1.down"}
    assert of_three == [(name, 3 if name in last else count) for name, count in all_of_them]
