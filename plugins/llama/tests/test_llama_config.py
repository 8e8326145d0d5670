"""A Llama's config.json is read whole or refused by key."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from paddock.axes import Embedding, Linear
from paddock.errors import ModelConfigError
from paddock_llama.config import parse_config
from paddock_llama.weights import weight_table

LLAMA2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def parameters(raw: dict[str, Any]) -> int:
    """Return how many parameters the weight table declares."""
    total = 0
    for _, _, module in weight_table(parse_config(raw)).modules():
        if isinstance(module, Embedding):
            total += module.rows.size * module.width.size
        elif isinstance(module, Linear):
            total += 0 if module.tied_to else module.out_size * module.in_size + module.bias * module.out_size
        else:
            total += module.width.size
    return total


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 68_976_648_192),
        (
            {
                "hidden_size": 16384,
                "intermediate_size": 53248,
                "num_attention_heads": 128,
                "num_hidden_layers": 126,
                "vocab_size": 128256,
            },
            405_853_388_800,
        ),
        (
            {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_hidden_layers": 16,
                "vocab_size": 128256,
                "tie_word_embeddings": True,
            },
            1_235_814_400,
        ),
    ],
    ids=["2-70b", "3.1-405b", "3.2-1b"],
)
def test_published_models_have_their_published_size(changes: dict[str, Any], expected: int) -> None:
    """The weight table declares exactly the parameters the release has."""
    assert parameters(LLAMA2_70B | changes) == expected


def test_llama_2_without_rope_theta_has_base_10000() -> None:
    """A missing rope_theta is 10000, and 16-bit floats are read from torch_dtype."""
    config = parse_config(LLAMA2_70B)
    assert (config.rope.theta, config.dtype, config.eos_token_ids, config.max_model_len) == (10000.0, "float16", (2,), 4096)


def test_defaults_fill_what_old_configs_leave_out() -> None:
    """Without head_dim and num_key_value_heads, heads share the width evenly and each has its own keys."""
    raw = {key: value for key, value in LLAMA2_70B.items() if key != "num_key_value_heads"}
    config = parse_config(raw)
    assert (config.head_dim, config.num_kv_heads) == (128, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 7}, "num_key_value_heads is 7"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"hidden_size": 8190}, "hidden_size is 8190"),
        ({"hidden_size": 1 << 30}, "hidden_size is 1073741824"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.type is 'su'"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"attention_biass": True}, "did you mean 'attention_bias'"),
        ({"torch_dtype": "float64"}, "torch_dtype is 'float64'"),
    ],
)
def test_what_is_not_supported_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    """An unknown key or unsupported value is an error that names it."""
    with pytest.raises(ModelConfigError, match=message):
        parse_config(LLAMA2_70B | changes)


def test_a_key_the_user_ignores_passes() -> None:
    """`ignore_config_keys` lets an unknown key through."""
    assert parse_config(LLAMA2_70B | {"sliding_window": 4096}, ignored=("sliding_window",)) == parse_config(LLAMA2_70B)


def test_reading_a_config_needs_no_torch() -> None:
    """Planning imports the config and the weight table alone."""
    code = "import sys, paddock_llama.plugin, paddock_llama.config, paddock_llama.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
