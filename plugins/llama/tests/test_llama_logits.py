"""Llama's logits are those of `transformers`, in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from paddock.testing.contracts import build_model
from paddock.testing.oracle import relative_rms
from paddock_llama.plugin import paddock_models

BOUND = 1e-5
(SPEC,) = paddock_models()
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 24},
    "narrow_heads": {"head_dim": 6},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "theta": {"rope_theta": 500000.0},
    "eps": {"rms_norm_eps": 1e-2},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn_mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
    "yarn_attention_factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "attention_factor": 1.3}
    },
}


def reference(raw: dict[str, Any], *, seed: int = 0) -> Any:
    """Return a random float32 model of transformers, biases and norms included."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**raw))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def our_logits(model: Any, raw: dict[str, Any], tokens: list[int], *, max_model_len: int) -> Tensor:
    """Return our logits [T, V] from the same weights: all but the last token as a prompt, then a decode."""
    built = build_model(SPEC, raw, state=dict(model.state_dict()), max_model_len=max_model_len)
    return built.run([("a", tokens[:-1])], [("a", tokens[-1:])])["a"]


def compare(raw: dict[str, Any], *, length: int, max_model_len: int | None = None, seed: int = 0) -> None:
    """Check that both give the same logits for a random text of that length."""
    model = reference(raw, seed=seed)
    tokens = torch.randint(raw["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))
    expected = model(tokens[None]).logits[0]
    error = relative_rms(our_logits(model, raw, tokens.tolist(), max_model_len=max_model_len or length), expected)
    assert error < BOUND, error


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers_beyond_the_original_context(changes: dict[str, Any]) -> None:
    """Every variant agrees at positions up to twice max_position_embeddings."""
    compare(TINY | changes, length=64)


@pytest.mark.parametrize(("length", "max_model_len"), [(32, 32), (9, 32), (64, 64)])
def test_dynamic_rope_equals_transformers_unscaled_and_at_full_length(length: int, max_model_len: int) -> None:
    """Dynamic scaling agrees for prompts within the original context, and for one of exactly max_model_len."""
    compare(TINY | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, length=length, max_model_len=max_model_len)


def test_both_spellings_of_rope_give_one_config() -> None:
    """`rope_parameters` and `rope_theta` with `rope_scaling` are read alike, as transformers writes the former."""
    old: dict[str, Any] = TINY | {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}
    new = LlamaConfig(**old).to_diff_dict()
    assert "rope_parameters" in new
    assert build_model(SPEC, new).config == build_model(SPEC, old).config


@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2), (8, 4)]),
    head_dim=st.sampled_from([2, 6, 16]),
    ffn=st.integers(1, 40),
    layers=st.integers(1, 3),
    vocab=st.integers(2, 70),
    length=st.integers(2, 40),
    tied=st.booleans(),
    biases=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_logits_equal_transformers_on_random_shapes(
    heads: tuple[int, int],
    head_dim: int,
    ffn: int,
    layers: int,
    vocab: int,
    length: int,
    tied: bool,
    biases: tuple[bool, bool],
    seed: int,
) -> None:
    """Any combination of sizes agrees."""
    raw = {
        "hidden_size": heads[0] * 6,
        "intermediate_size": ffn,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "attention_bias": biases[0],
        "mlp_bias": biases[1],
        "initializer_range": 0.2,
    }
    compare(raw, length=length, seed=seed)
