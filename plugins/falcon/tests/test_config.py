from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from paddock.errors import ModelConfigError
from paddock_falcon.config import FalconConfig, attention_needs, parse_config

SEVEN = {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 65024}
BIG = {**SEVEN, "hidden_size": 14848, "num_attention_heads": 232, "num_hidden_layers": 80, "num_kv_heads": 8}
BIG = {**BIG, "multi_query": True, "new_decoder_architecture": True, "parallel_attn": True, "torch_dtype": "bfloat16"}
RW = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50304, "eos_token_id": 2}
RW = {**RW, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
OLD_SPELLING = {
    "hidden_size": "n_embed",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "num_kv_heads": "n_head_kv",
}


def _old(raw: dict[str, Any], model_type: str) -> dict[str, Any]:
    return {OLD_SPELLING.get(key, key): value for key, value in raw.items()} | {"model_type": model_type}


def _shape(config: FalconConfig) -> tuple[Any, ...]:
    return config.num_kv_heads, config.head_dim, config.ffn_size, config.parallel, config.block_norms, config.tied


def test_the_published_models_have_their_published_shapes() -> None:
    """7B, 180B and RW-1B: KV heads, head size, feed-forward size, order of the branches, norms and ties, keys absent included."""
    assert _shape(parse_config(SEVEN)) == (1, 64, 18176, True, 1, True)
    assert _shape(parse_config(BIG)) == (8, 64, 59392, True, 2, True)
    assert _shape(parse_config(RW)) == (32, 64, 8192, False, 2, True)


def test_a_second_generation_model_has_one_norm_and_its_own_head() -> None:
    """The 11B's keys give one norm in a grouped block and an untied head."""
    eleven = {**BIG, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "ff_factor": 4, "rope_theta": 500042.0}
    assert _shape(parse_config(eleven)) == (8, 64, 59392, True, 1, False)


def test_the_refined_web_spelling_means_the_same() -> None:
    """`RefinedWeb` is the grouped decoder without its key, `RefinedWebModel` the old one, both with the short names."""
    big = {key: value for key, value in BIG.items() if key != "new_decoder_architecture"}
    assert parse_config(_old(big, "RefinedWeb")) == parse_config(BIG)
    assert parse_config(_old(SEVEN, "RefinedWebModel")) == parse_config(SEVEN)


def test_the_first_configs_of_the_7b_and_40b_are_read_whole() -> None:
    """Every key they hold is known, code of their own that they name included, which is never run."""
    shared = {"alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["RWForCausalLM"]}
    shared |= {"attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_RW.RWConfig"}, "bias": False}
    shared |= {"bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "initializer_range": 0.02}
    shared |= {"layer_norm_epsilon": 1e-05, "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True}
    shared |= {"transformers_version": "4.27.4", "vocab_size": 65024}
    seven = {"hidden_size": 4544, "model_type": "RefinedWebModel", "multi_query": True, "n_head": 71, "n_layer": 32}
    forty = {"hidden_size": 8192, "model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60}
    assert _shape(parse_config(shared | seven)) == (1, 64, 18176, True, 1, True)
    assert _shape(parse_config(shared | forty)) == (8, 64, 32768, True, 2, True)
    assert parse_config(shared | seven) == evolve(parse_config(SEVEN), dtype="bfloat16")


def test_an_empty_config_is_the_seven_billion_model() -> None:
    """Keys that savers drop because they hold the default come back as that default."""
    assert parse_config({}) == parse_config(SEVEN)


def test_alibi_replaces_rotation_and_is_asked_of_the_backend() -> None:
    """An ALiBi model has no rotary embedding and needs the feature; the others need none."""
    assert parse_config(RW).rope is None
    assert attention_needs(parse_config(RW)).features == {"alibi"}
    needs = attention_needs(parse_config(BIG))
    assert (needs.num_heads, needs.num_kv_heads, needs.head_dim, needs.features) == (232, 8, 64, frozenset())


def test_multi_query_counts_only_in_the_old_decoder() -> None:
    """The grouped decoder ignores `multi_query`; the old one takes the number of KV heads from it, whatever savers wrote."""
    assert parse_config({**BIG, "multi_query": False}) == parse_config(BIG)
    assert parse_config({**SEVEN, "num_kv_heads": 71}) == parse_config({**SEVEN, "num_kv_heads": 8}) == parse_config(SEVEN)
    assert parse_config({**RW, "num_kv_heads": 32}) == parse_config(RW)


def test_both_spellings_of_dtype_and_rotation_are_read() -> None:
    """What transformers 5 writes equals what it wrote before."""
    new = {**SEVEN, "dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    old = {**SEVEN, "torch_dtype": "bfloat16", "rope_theta": 10000, "rope_scaling": None}
    assert parse_config(new) == parse_config(old) == evolve(parse_config(SEVEN), dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "said", "way_out"),
    [
        ({"activation": "gelu_new"}, "activation is 'gelu_new'", "'gelu', the only value supported"),
        ({"num_kv_heads": 7}, "num_kv_heads is 7", "a divisor of num_attention_heads, 232"),
        ({"hidden_size": 14849}, "hidden_size is 14849", "a multiple of 464"),
        ({"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3", "from 1 to 2"),
        ({"n_head": 231}, "num_attention_heads is 232 but n_head is 231", "keep one of the two"),
        ({"ff_factor": 4, "ffn_hidden_size": 7}, "ffn_hidden_size is 7", "59392"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0", "a whole number from 1"),
        ({"model_type": "bloom"}, "model_type is 'bloom'", "'RefinedWeb'"),
        ({"parallel_attn": False}, "parallel_attn is False", "whose blocks are parallel"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling.type is 'longrope'", "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "no rope_parameters.factor", "add rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "default", "fator": 2.0}}, "rope_parameters.+fator", "ignore_config_keys"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5", "1.0, the only value supported"),
        ({"alibi": True, "rope_scaling": {"type": "linear", "factor": 2.0}}, "alibi is True", "remove the scaling"),
        ({"bias": "yes"}, "bias is 'yes'", "true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'", "bfloat16"),
        ({"sliding_window": 512}, "sliding_window = 512", "ignore_config_keys=sliding_window"),
    ],
)
def test_an_unsupported_value_is_named_with_a_way_out(change: dict[str, Any], said: str, way_out: str) -> None:
    """Each wrong, contradictory or unknown key is an error that names key and value, and what would do."""
    with pytest.raises(ModelConfigError, match=said) as caught:
        parse_config({**BIG, **change})
    assert way_out in caught.value.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"multi_query": False, "num_kv_heads": 1}, "num_kv_heads is 1"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
    ],
)
def test_what_only_the_new_decoder_has_is_refused_in_the_old_one(change: dict[str, Any], said: str) -> None:
    """Groups, and a norm for each branch, are not dropped silently where the key that asks for the new decoder is missing."""
    with pytest.raises(ModelConfigError, match=said) as caught:
        parse_config({**SEVEN, **change})
    assert "new_decoder_architecture" in caught.value.fix


def test_errors_use_the_spelling_of_the_file() -> None:
    """A RefinedWeb config is told about its own keys."""
    raw = _old(BIG, "RefinedWeb")
    with pytest.raises(ModelConfigError, match="n_head_kv is 7"):
        parse_config(raw | {"n_head_kv": 7})
    with pytest.raises(ModelConfigError, match="n_embed is 14849"):
        parse_config(raw | {"n_embed": 14849})


def test_an_unknown_key_passes_when_the_user_says_so() -> None:
    """`ignore_config_keys` lets a key through."""
    assert parse_config({**BIG, "sliding_window": 512}, ("sliding_window",)) == parse_config(BIG)
