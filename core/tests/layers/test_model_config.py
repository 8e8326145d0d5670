"""config.json is read strictly: every key typed, bounded and accounted for."""

from __future__ import annotations

from typing import Any

import pytest

from paddock.errors import ModelConfigError
from paddock.model_config import ConfigReader, RopeSpec, eos_token_ids, parse_rope


def read_rope(raw: dict[str, Any], context: int = 64) -> RopeSpec:
    """Return the rope of a config, checking that every key was read."""
    reader = ConfigReader(raw)
    spec = parse_rope(reader, max_position_embeddings=context)
    reader.finish()
    return spec


def test_an_unknown_key_is_named_with_the_nearest_one_and_the_way_out() -> None:
    """A misspelt key's error quotes it, its value, the likely key and the option that lets it pass."""
    reader = ConfigReader({"hidden_size": 8, "rms_norm_epsilon": 1e-6})
    reader.integer("hidden_size")
    reader.number("rms_norm_eps", default=1e-5)
    with pytest.raises(ModelConfigError, match=r"rms_norm_epsilon = 1e-06 \(did you mean 'rms_norm_eps'\?\)") as caught:
        reader.finish()
    assert "ignore_config_keys=rms_norm_epsilon" in caught.value.fix


@pytest.mark.parametrize(
    "raw", [{"use_cache": True}, {"_private": 1}, {"auto_map": {"x": "y"}}, {"odd": 1}, {"sliding_window": None}]
)
def test_bookkeeping_ignored_and_null_keys_pass(raw: dict[str, Any]) -> None:
    """Keys nobody needs, keys the user lets pass, and keys that are null are no errors."""
    ConfigReader(raw, ignored=("odd",)).finish()


@pytest.mark.parametrize("value", [0, -1, True, "8", 2.5, 1 << 40, None])
def test_integers_out_of_range_are_refused(value: object) -> None:
    """Nothing but a whole number within bounds becomes a size, so no absurd size is ever allocated."""
    with pytest.raises(ModelConfigError, match="hidden_size"):
        ConfigReader({"hidden_size": value}).integer("hidden_size")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, -1.0])
def test_numbers_that_are_not_finite_and_in_range_are_refused(value: object) -> None:
    """Nothing but a finite number within bounds passes."""
    with pytest.raises(ModelConfigError, match="eps"):
        ConfigReader({"eps": value}).number("eps", default=1.0)


def test_a_missing_key_is_named() -> None:
    """A required key that is absent is named in the error."""
    with pytest.raises(ModelConfigError, match="no vocab_size"):
        ConfigReader({}).integer("vocab_size")


def test_aliases_agree_or_are_an_error() -> None:
    """Two spellings of one key may both stand there when they say the same."""
    assert ConfigReader({"n_head": 4, "num_heads": 4}).integer("num_heads", "n_head") == 4
    with pytest.raises(ModelConfigError, match="num_heads is 4 but n_head is 8"):
        ConfigReader({"n_head": 8, "num_heads": 4}).integer("num_heads", "n_head")


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([3, 1, 3], (3, 1)), (None, (7,)), ("absent", (7,))], ids=["int", "list", "null", "absent"]
)
def test_eos_is_one_id_or_several(value: Any, expected: tuple[int, ...]) -> None:
    """A number, a list, or nothing at all."""
    raw = {} if value == "absent" else {"eos_token_id": value}
    assert ConfigReader(raw).token_ids("eos_token_id", default=(7,)) == expected


@pytest.mark.parametrize("value", [-1, "2", [True], [[1]], 1.5])
def test_eos_that_is_no_token_id_is_refused(value: Any) -> None:
    """Only token ids end a text."""
    with pytest.raises(ModelConfigError, match="eos_token_id"):
        ConfigReader({"eos_token_id": value}).token_ids("eos_token_id")


def test_the_generation_config_wins_over_the_config() -> None:
    """Ids of generation_config.json replace those of config.json where there are any."""
    assert eos_token_ids((2,), {"eos_token_id": [128001, 128009], "top_p": 0.9}) == (128001, 128009)
    assert eos_token_ids((2,), {"bos_token_id": 1}) == (2,)
    assert eos_token_ids((2,), None) == (2,)


@pytest.mark.parametrize("raw", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}])
def test_the_dtype_is_read_in_every_spelling(raw: dict[str, Any]) -> None:
    """Old and new keys, with and without prefix."""
    assert ConfigReader(raw).dtype() == "bfloat16"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5.0}, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_scaling": None}, {}),
    ],
)
def test_old_and_new_rope_keys_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """rope_theta with rope_scaling, or rope_parameters alone."""
    assert read_rope(old) == read_rope(new)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "longrope", "factor": 2.0}, "rope_scaling.type is 'longrope'"),
        ({"type": "linear"}, "no rope_scaling.factor"),
        ({"type": "linear", "factor": 0.5}, "rope_scaling.factor is 0.5"),
        ({"type": "linear", "factor": 2.0, "betafast": 1}, "rope_scaling.betafast"),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
        ({"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"type": "yarn", "rope_type": "linear"}, "rope_type is 'linear' but type is 'yarn'"),
        ([1], "rope_scaling is"),
    ],
)
def test_a_rope_that_is_not_supported_names_the_key(scaling: Any, message: str) -> None:
    """An unknown type, a missing number, an unknown key or an odd value is an error naming the key."""
    with pytest.raises(ModelConfigError, match=message):
        read_rope({"rope_scaling": scaling})


def test_scaled_ropes_stretch_the_context() -> None:
    """linear, dynamic and yarn reach factor times as far; llama3's config states the stretched context itself."""
    stretched = {
        kind: read_rope({"rope_scaling": {"type": kind, "factor": 4.0}}).context(64) for kind in ("linear", "dynamic", "yarn")
    }
    assert stretched == {"linear": 256, "dynamic": 256, "yarn": 256}
    llama3 = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    assert read_rope({"rope_scaling": llama3}).context(64) == 64


def test_errors_name_the_file() -> None:
    """Whatever other file the object stands in."""
    with pytest.raises(ModelConfigError, match=r"^generation_config\.json: eos_token_id is 'x'"):
        eos_token_ids((2,), {"eos_token_id": "x"})
    reader = ConfigReader({"a": {"b": 1}}, harmless=(), file="other.json").section("a")
    assert reader is not None
    with pytest.raises(ModelConfigError, match=r"^other\.json holds 1 .*a\.b = 1"):
        reader.finish()
    with pytest.raises(ModelConfigError, match=r"^other\.json has no a\.c"):
        reader.integer("c")
