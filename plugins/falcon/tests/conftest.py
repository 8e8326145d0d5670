"""The Falcon variants in miniature, as transformers' FalconConfig takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_TINY = {"vocab_size": 62, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {"hidden_size": 32, "new_decoder_architecture": True, "num_kv_heads": 2}
_LONG = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 32, "multi_query": True, "parallel_attn": True},
    "40b": {**_GROUPED, "bias": False},
    "180b": {**_GROUPED, "num_attention_heads": 6, "hidden_size": 48, "multi_query": True},
    "11b": {**_GROUPED, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "rw": {"hidden_size": 32, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    "serial-rope": {"hidden_size": 32, "bias": True, "multi_query": False, "parallel_attn": False},
    "parallel-heads": {"hidden_size": 32, "multi_query": False, "parallel_attn": True, "ffn_hidden_size": 80},
    "grouped-alibi": {**_GROUPED, "alibi": True, "bias": True, "layer_norm_epsilon": 1e-3},
    "yarn": {**_GROUPED, "rope_parameters": {**_LONG, "rope_type": "yarn", "rope_theta": 10000.0}},
    "llama3": {
        "hidden_size": 32,
        "rope_parameters": {**_LONG, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "long": {**_GROUPED, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every variant in turn."""
    return {**_TINY, **VARIANTS[request.param]}


@pytest.fixture
def reference_model() -> Callable[[dict[str, Any]], Any]:
    """Return a function that makes transformers' model of a variant, every parameter random."""
    import torch
    import transformers

    def make(variant: dict[str, Any]) -> Any:
        torch.manual_seed(3)
        model: Any = transformers.FalconForCausalLM(transformers.FalconConfig(**variant))
        model.eval()
        for name, parameter in model.named_parameters():
            norm = ".ln" in name or "layernorm" in name
            parameter.data.normal_(mean=1.0 if norm and name.endswith("weight") else 0.0, std=0.1 if norm else 0.3)
        return model

    return make
