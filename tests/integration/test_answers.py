"""From Python and the command line to tokens and back, on a tiny random Llama with a tiny tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddock import LLM, SamplingParams
from paddock.cli.main import main
from paddock.errors import CheckpointError
from paddock.testing.text import byte_level_tokenizer
from paddock.text.prompts import Prompt

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 1,
}
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
DUMMY = ("--load-format", "dummy", "--device", "cpu")
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder without weights."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG))
    byte_level_tokenizer().core.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Return the LLM."""
    with LLM(folder, load_format="dummy", device="cpu", kv_cache_memory_bytes=1 << 22) as llm:
        yield llm


def test_a_stream_ends_as_generate_does(llm: LLM) -> None:
    """A seeded request gives the same tokens and text streamed as at once, whatever shares its batch."""
    (alone,) = llm.generate(["the fox"], PARAMS)
    together = llm.generate(["a paddock", "the fox", "jumps"], PARAMS)
    streamed = list(llm.stream("the fox", PARAMS))
    assert alone.token_ids == together[1].token_ids == streamed[-1].token_ids
    assert alone.text == together[1].text == streamed[-1].text
    assert len(streamed) == len(alone.token_ids) == 12


def test_a_stop_string_cuts_one_continuation_of_several(llm: LLM) -> None:
    """Text the model is known to give, used as a stop string, ends a request there and frees its pages for the next."""
    whole = llm.generate("the fox", PARAMS)[0].text
    stop = next(character for character in whole[2:] if character.isprintable() and character != "\N{REPLACEMENT CHARACTER}")
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True, stop=stop, n=2)
    (output,) = llm.generate(["the fox"], params)
    assert output.text == whole[: whole.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert len(output.outputs) == 2
    assert llm.generate("the fox", PARAMS)[0].text == whole


def test_a_requests_times_are_in_order(llm: LLM) -> None:
    """A request arrives, is scheduled, gives its first token and ends, by one clock."""
    times = llm.generate("the fox", PARAMS)[0].timings
    assert times is not None
    order = [times.arrived, times.scheduled, times.first_token, times.finished]
    assert None not in order
    assert order == sorted(order)  # type: ignore[type-var]


def test_bad_requests_fail_alone(llm: LLM) -> None:
    """Too long, empty and out of range come back as errors among answers."""
    prompts: list[Prompt] = ["the fox", "x" * 200, [300], "", "a"]
    outputs = llm.generate(prompts, PARAMS)
    assert [output.finish_reason for output in outputs] == ["length", "error", "error", "error", "length"]


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    """Every token and every prompt position has its candidates, in text, and greedy tokens rank first."""
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate(["the fox"], params)
    entries = output.outputs[0].logprobs
    assert entries is not None
    assert [entry[token].rank for entry, token in zip(entries, output.token_ids, strict=True)] == [1] * 4
    assert all(logprob.decoded_token is not None for entry in entries for logprob in entry.values())
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_a_folder_needs_its_tokenizer_unless_told_otherwise(tmp_path: Path) -> None:
    """From config.json alone, random weights take token ids; real weights ask for the tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with LLM(tmp_path, load_format="dummy", device="cpu") as bare:
        (output,) = bare.generate([[5, 6]], PARAMS)
        assert (len(output.token_ids), output.text) == (12, "")
    with pytest.raises(CheckpointError):
        LLM(tmp_path, device="cpu")


def test_the_command_line_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Generate prints one JSON object a prompt, the same as Python's answers."""
    code = main(["generate", str(folder), "the fox", "a", "--json", "--max-tokens", "5", *DUMMY])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (code, [line["prompt"] for line in lines]) == (0, ["the fox", "a"])
    assert all(1 <= len(line["token_ids"]) <= 5 for line in lines)


def test_the_bench_runs_on_random_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Throughput of a model that is only a config: the sizes asked for are the sizes produced."""
    code = main(["bench", "throughput", str(folder), "--requests", "5", "--isl", "9", "--osl", "7", "--json", *DUMMY])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["isl"], report["osl"]) == (0, 9, 7)
    assert report["itl_p99_ms"] >= report["itl_median_ms"] > 0
