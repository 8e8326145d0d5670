"""What SamplingParams takes, by what names, and how it refuses the rest."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from attrs import asdict, evolve

from paddock import RequestError, SamplingParams


def test_defaults_are_those_users_of_vllm_know() -> None:
    """One continuation of sixteen tokens drawn from the whole distribution, ending at eos, special tokens hidden."""
    assert asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "bad_words": (),
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "seed": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
    }


def test_one_text_is_a_list_of_one_and_keys_may_be_texts() -> None:
    """A stop string needs no list; token ids come in any collection; logit_bias as JSON has it."""
    given = SamplingParams(stop="\n", bad_words=["a", "b"], stop_token_ids={7}, logit_bias={"5": 1, 3: -2.5})  # type: ignore[dict-item]
    assert (given.stop, given.bad_words, given.stop_token_ids) == (("\n",), ("a", "b"), (7,))
    assert given.logit_bias == ((3, -2.5), (5, 1.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (0, -1, 1.0, True, None)),
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), 1e31, "1", None, True)),
        *(("top_k", value) for value in (-2, 1.5, None)),
        *(("top_p", value) for value in (0, -0.1, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("repetition_penalty", value) for value in (0, -1, 1e-7, 1e7, float("nan"))),
        *(("presence_penalty", value) for value in (-2.1, 2.1)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1)),
        *(("logit_bias", value) for value in ({1: float("nan")}, {1: float("-inf")}, {1: 1e31}, {1.5: 1}, {"a": 1}, [3], 7)),
        *(("bad_words", value) for value in ([1], 5, "", ["a", ""])),
        *(("max_tokens", value) for value in (0, -1, 2.0, True)),
        *(("min_tokens", value) for value in (-1, 17, None)),
        *(("stop", value) for value in ([1], 5, "", ["a", None])),
        *(("stop_token_ids", value) for value in (5, ["a"], [True], [1.5], "12", {3: 4})),
        *((name, 1) for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")),
        *(("seed", value) for value in (-1, 1.0)),
        *((name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, True, 1.0)),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    """The error says which option, and what may be given instead."""
    with pytest.raises(RequestError, match=rf"^{name} (is )?.*") as raised:
        SamplingParams(**{name: value})
    assert name in raised.value.fix


def test_an_unknown_option_names_the_nearest() -> None:
    """A misspelt option is never dropped, nor a bare TypeError."""
    with pytest.raises(RequestError, match=r"(?s)unknown sampling option 'temprature'.*'temperature'"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_parameters_are_values() -> None:
    """They compare, hash, evolve and travel between processes."""
    given = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.0})
    assert pickle.loads(pickle.dumps(given)) == given == evolve(given)
    assert hash(evolve(given, seed=1)) != hash(given)
