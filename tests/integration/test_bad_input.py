"""Bad input at the command line, end to end on a tiny Llama: one block with the value and the way out, and nothing else."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from attrs import field, frozen
from core.tests.plugins.made import Site, model_source
from safetensors.torch import load_file, save_file

from paddock import LLM, SamplingParams
from paddock.cli.main import main
from paddock.errors import RequestError
from paddock.testing.text import byte_level_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
SHAPES = {
    "model.embed_tokens": (300, 32),
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.0.self_attn.v_proj": (16, 32),
    "model.layers.0.self_attn.o_proj": (32, 32),
    "model.layers.0.mlp.gate_proj": (48, 32),
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
    "model.layers.0.input_layernorm": (32,),
    "model.layers.0.post_attention_layernorm": (32,),
    "model.norm": (32,),
    "lm_head": (300, 32),
}
SERVED_BY_TRITON = {"head_dim": 64, "torch_dtype": "bfloat16"}
WEIGHTS, LONG = "model.safetensors", "q w " * 100
Break = Callable[[Path], object]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model with nothing wrong."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    chance = torch.Generator().manual_seed(0)
    save_file({f"{name}.weight": torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_level_tokenizer().core.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    return folder


@pytest.fixture
def tiny(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the tiny model, called `tiny` in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def header(text: str, *, data: int = 0, length: int | None = None) -> Break:
    """Return what writes a weights file with that header, `data` bytes behind it, and its length or another."""
    start = struct.pack("<Q", len(text) if length is None else length)
    return lambda folder: (folder / WEIGHTS).write_bytes(start + text.encode() + bytes(data))


def entry(start: int, end: int) -> str:
    """Return the header's entry of an F32 vector at those bytes."""
    return json.dumps({"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]})


def config(**changes: object) -> Break:
    """Return what writes a config with those keys changed, or without those that are None."""
    keys = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    return lambda folder: (folder / "config.json").write_text(json.dumps(keys))


def cut(folder: Path) -> None:
    """Lose the second half of the weights."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def mix_up(folder: Path) -> None:
    """Leave a tensor out, and add one."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file({**tensors, "model.more.weight": torch.zeros(3)}, folder / WEIGHTS)


def add(folder: Path) -> None:
    """Add a tensor, which loading refuses and the plan does not see."""
    save_file({**load_file(folder / WEIGHTS), "model.more.weight": torch.zeros(3)}, folder / WEIGHTS)


def add_without_tokenizer(folder: Path) -> None:
    """Lose the tokenizer too."""
    add(folder)
    (folder / "tokenizer.json").unlink()


def reshape(folder: Path) -> None:
    """Store a tensor in another shape, and one in another dtype."""
    tensors = load_file(folder / WEIGHTS)
    norm = tensors["model.norm.weight"].to(torch.int32)
    save_file({**tensors, "model.norm.weight": norm, "lm_head.weight": torch.zeros(299, 32)}, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    """Have a pickle where the safetensors were."""
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@frozen(kw_only=True)
class Case:
    """What is wrong, the command (after `paddock`), the exit code, what is shown all the same, and what the error says."""

    command: Sequence[str] = ("generate", "tiny", "hi", "--json")
    breaks: Break = field(default=lambda folder: None)
    code: int = 1
    shown: str = ""
    says: tuple[str, ...]


def options(*words: str, code: int = 2, says: tuple[str, ...]) -> Case:
    """Return the case of `generate` with those options."""
    return Case(command=("generate", "tiny", "hi", *words), code=code, says=says)


def gpus(*words: str, shown: str = "", says: tuple[str, ...]) -> Case:
    """Return the case of `plan` for GPUs that need not be here."""
    return Case(command=("plan", "tiny", "--gpus", *words), breaks=config(**SERVED_BY_TRITON), shown=shown, says=says)


CASES = {
    "missing folder": Case(command=("generate", "./tny", "hi"), says=("no model folder './tny'", "did you mean 'tiny'?")),
    "missing folder, none near": Case(command=("chat", "./x/"), says=("no model folder './x/'", "model folders in '.': tiny")),
    "a file": Case(command=("generate", "tiny/config.json", "hi"), says=("is a file", "give the folder it is in: tiny")),
    "no architectures": Case(breaks=config(architectures=None), says=("no architectures", "add")),
    "unknown architecture": Case(
        breaks=config(architectures=["MixtralForCausalLM"]),
        says=("'MixtralForCausalLM'", "installed: ", "paddock-llama", "known: ", "install a plugin that brings it"),
    ),
    "unknown config key": Case(breaks=config(rope_thta=1), says=("rope_thta", "did you mean 'rope_theta'")),
    "not JSON": Case(breaks=lambda folder: (folder / "config.json").write_text("{,}"), says=("config.json", "line 1 column 2")),
    "truncated": Case(breaks=cut, says=("model.safetensors: truncated", "bytes of tensor data are missing", "fetch")),
    "oversized header": Case(breaks=header("{}", length=1 << 40), says=("1,099,511,627,776", "100,000,000 allowed", "fetch")),
    "duplicate key": Case(
        breaks=header(f'{{"a": {entry(0, 4)}, "a": {entry(0, 4)}}}', data=4), says=("the key 'a' appears twice", "fetch")
    ),
    "overlapping": Case(
        breaks=header(f'{{"a": {entry(0, 8)}, "b": {entry(4, 12)}}}', data=12), says=("tensor 'b' overlaps", "fetch")
    ),
    "wrong tensors": Case(
        breaks=mix_up,
        says=(
            "model.norm.weight: missing",
            "model.more.weight: unexpected",
            "from the same export",
        ),
    ),
    "a tensor too many": Case(
        breaks=add, says=("'model.more.weight': unexpected; no parameter of the model takes it", "check that")
    ),
    "misfits": Case(
        breaks=reshape,
        says=(
            "does not fit the model (2 of its tensors)",
            "'lm_head.weight': has shape [299, 32]; the model wants F32 [300, 32]",
            "'model.norm.weight': is I32, of shape [32]; the model wants F32 [32]",
            "check that",
        ),
    ),
    "truncated, when planned": Case(
        command=("plan", "tiny", "--device", "cpu"),
        breaks=cut,
        shown="tiny on ",
        says=("model.safetensors: truncated", "bytes of tensor data are missing", "fetch"),
    ),
    "no tokenizer, seen before the weights are read": Case(
        breaks=add_without_tokenizer,
        says=("tiny has no tokenizer.json", "write one"),
    ),
    "a pickle": Case(breaks=pickled, says=("pytorch_model.bin", "safetensors", "convert")),
    "temperature": options("--temperature", "nan", says=("temperature is nan", "give temperature a number from 0")),
    "top_k": options("--top-k", "-3", says=("top_k is -3", "0 or -1 for all tokens")),
    "top_p": options("--top-p", "0", says=("top_p is 0.0", "above 0, at most 1")),
    "max_tokens": options("--max-tokens", "0", says=("'--max-tokens': 0", "x>=1", "--help")),
    "seed": options("--seed", "-1", says=("'--seed': -1", "x>=0", "--help")),
    "chat's temperature, before anything loads": Case(
        command=("chat", "no/model/here", "--temperature", "-1"), code=2, says=("temperature is -1.0", "from 0 (greedy)")
    ),
    "misspelt option": options("--temprature", "1", says=("'--temprature'", "'--temperature'")),
    "unknown dtype": options("--dtype", "bf16", says=("'bf16'", "'bfloat16'")),
    "length beyond the model's": options("--max-model-len", "65", code=1, says=("max_model_len is 65", "to 64")),
    "pool too small": options(
        "--kv-cache-memory-bytes", "99", "--dtype", "bfloat16", code=1, says=("KV pool of 0 pages", "needs 4", "at least 4096")
    ),
    "no such tokenizer": options("--tokenizer", "./tny", code=1, says=("tokenizer is './tny'", "did you mean 'tiny'?")),
    "no GPU": options("--device", "cuda", says=("'cuda'", "torch sees no GPU")),
    "GPU too old for a backend": gpus(
        *("A100", "--attention-backend", "triton"),
        says=("attention_backend is 'triton'", "needs compute capability 9.0, NVIDIA A100 80GB has 8.0", "torch can serve"),
    ),
    "GPU too old for an op": gpus(
        "L40S", "--op", "gelu=triton", says=("op 'gelu'", "NVIDIA L40S has 8.9", "leave gelu out of ops")
    ),
    "dtype no backend kernel takes": gpus(
        *("H200", "--attention-backend", "triton", "--dtype", "float32"),
        says=("takes bfloat16, float16, not float32", "set dtype to bfloat16 or float16", "torch can serve"),
    ),
    "head size no kernel takes": Case(
        command=("plan", "tiny", "--gpus", "H200", "--attention-backend", "triton"),
        breaks=config(head_dim=24, torch_dtype="bfloat16"),
        says=("serves head sizes", "not 24", "leave attention_backend at auto: torch can serve"),
    ),
    "backend for a GPU on a CPU": options(
        "--attention-backend", "triton", code=1, says=("runs on cuda, not on cpu", "torch can serve")
    ),
    "op of nobody": options("--op", "gelu=acme", says=("'gelu' from 'acme'", "triton")),
    "op without owner": options("--op", "gelu", says=("--op is 'gelu'", "--op NAME=OWNER")),
    "fallback under strict": gpus(
        "A100",
        "--strict",
        shown="tiny on NVIDIA A100 80GB",
        says=("attention backend triton", "9.0", "set attention_backend to torch to say that this is enough"),
    ),
    "no prompt": Case(command=("generate", "tiny"), code=2, says=("no prompts", "--prompts-file")),
    "empty prompt": Case(command=("generate", "tiny", ""), says=("'': the prompt is empty", "at least one token")),
    "long prompt": Case(command=("generate", "tiny", LONG), says=("400 tokens", "max_model_len 64", "at most 63")),
    "prompts in another encoding": Case(
        command=("generate", "tiny", "--prompts-file", "prompts"),
        code=2,
        breaks=lambda folder: (folder.parent / "prompts").write_bytes(b"ok\nab\xff\n"),
        says=("prompts is not UTF-8: line 2, byte 3 is 0xff", "save it as UTF-8"),
    ),
    "no prompts file": Case(
        command=("generate", "tiny", "--prompts-file", "nope"), code=2, says=("nope cannot be read", "check the path")
    ),
    "bench longer than the model": Case(
        command=("bench", "latency", "tiny", "--isl", "60", "--osl", "9"), says=("max_model_len is 69", "to 64")
    ),
    "bench of nothing": Case(
        command=("bench", "throughput", "tiny", "--requests", "0"), code=2, says=("'--requests': 0", "x>=1")
    ),
}


def on_a_cpu(command: Sequence[str]) -> list[str]:
    """Return the command for a CPU, whatever this machine has, unless it says where it runs or plans for GPUs by name."""
    return [*command] if {"--device", "--gpus"} & set(command) else [*command, "--device", "cpu"]


def one_block(capsys: Capture, *says: str, shown: str = "") -> None:
    """Check that standard output starts with what was to be shown and standard error is one error with its way out."""
    out, err = capsys.readouterr()
    assert out.startswith(shown) if shown else out == ""
    assert err.startswith("error: "), err
    assert (err.count("error: "), err.count("fix: "), "Traceback" in err) == (1, 1, False), err
    for words in says:
        assert words in err


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_block_with_value_and_way_out(tiny: Path, capsys: Capture, name: str) -> None:
    """Every mistake ends with its exit code, says what was wrong and what to do, and prints nothing as an answer."""
    case = CASES[name]
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    case.breaks(tiny)
    assert main(on_a_cpu(case.command)) == case.code
    one_block(capsys, *case.says, shown=case.shown)


def test_debug_adds_the_traceback(tiny: Path, capsys: Capture) -> None:
    """The block stays the last thing said."""
    config(architectures=None)(tiny)
    assert main(on_a_cpu(["generate", "tiny", "hi", "--debug"])) == 1
    trace, _, block = capsys.readouterr().err.rpartition("error: ")
    assert "Traceback (most recent call last)" in trace
    assert block.startswith("config.json has no architectures")


VARIABLES = {
    "an unknown plugin": ("PADDOCK_PLUGINS", "lama", 1, ("'lama'", "did you mean 'llama'?")),
    "no plugin": (
        "PADDOCK_PLUGINS",
        "",
        1,
        ("'LlamaForCausalLM'", "kept out by PADDOCK_PLUGINS", "add llama to PADDOCK_PLUGINS"),
    ),
    "an unknown variable": ("PADDOCK_PLUGIN", "x", 2, ("variable PADDOCK_PLUGIN\n", "did you mean 'PADDOCK_PLUGINS'?")),
    "an unknown level": ("PADDOCK_LOG", "loud", 2, ("PADDOCK_LOG is 'loud'", "warning")),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_wrong_variable_is_one_block(tiny: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The environment is checked as options are."""
    variable, value, code, says = VARIABLES[name]
    monkeypatch.setenv(variable, value)
    assert main(on_a_cpu(["generate", "tiny", "hi"])) == code
    one_block(capsys, *says)


PLUGINS = {
    "two owners": (model_source("LlamaForCausalLM"), "LlamaForCausalLM", ("acme 1.0", "paddock-llama", "prefer")),
    "raises on import": ("1 / 0", "AcmeForCausalLM", ("acme 1.0", "ZeroDivisionError", "'AcmeForCausalLM'")),
    "raises on collection": (
        "from paddock.plugins import hookimpl\n@hookimpl\ndef paddock_models():\n    raise KeyError('cow')",
        "AcmeForCausalLM",
        ("acme 1.0", "KeyError: 'cow'", "'AcmeForCausalLM'"),
    ),
    "unknown hook": (
        "from paddock.plugins import hookimpl\n@hookimpl\ndef paddock_modles():\n    return []",
        "AcmeForCausalLM",
        ("acme 1.0", "paddock_modles", "'AcmeForCausalLM'"),
    ),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_in_the_way_is_named(tiny: Path, capsys: Capture, site: Site, name: str) -> None:
    """A model that needs it says which plugin, of which version, did what."""
    source, architecture, says = PLUGINS[name]
    site.install("acme", source)
    config(architectures=[architecture])(tiny)
    assert main(on_a_cpu(["generate", "tiny", "hi"])) == 1
    one_block(capsys, *says)


@pytest.mark.parametrize("name", [name for name in PLUGINS if name != "two owners"])
def test_a_broken_plugin_harms_no_other_model(tiny: Path, capsys: Capture, site: Site, name: str) -> None:
    """What it does not serve is answered."""
    site.install("acme", PLUGINS[name][0])
    assert main(on_a_cpu(["generate", "tiny", "hi", "--max-tokens", "2"])) == 0
    assert capsys.readouterr().err == ""


def test_one_bad_prompt_of_a_batch_fails_alone(tiny: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line says why, standard output stays JSON lines, the others get what they get alone, and the exit code is 1."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"ab\n\n{LONG}\ncd\n".encode())))
    assert main(on_a_cpu(["generate", "tiny", "-", "--max-tokens", "3", "--json"])) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["finish_reason"] for line in lines] == ["length", "error", "error", "length"]
    assert "the prompt is empty" in lines[1]["error"]
    assert "400 tokens" in lines[2]["error"]
    assert err == ""
    for line in (lines[0], lines[3]):
        assert main(on_a_cpu(["generate", "tiny", line["prompt"], "--max-tokens", "3", "--json"])) == 0
        assert json.loads(capsys.readouterr().out) == line


def test_token_ids_out_of_range_fail_alone(whole: Path) -> None:
    """Ids below 0 or beyond the vocabulary are refused with the range; the neighbours are answered."""
    params = SamplingParams(temperature=0.0, max_tokens=2)
    with LLM(whole, device="cpu", progress=False) as llm:
        with pytest.raises(RequestError, match="300"):
            llm.generate([5, 300], params)
        good, high, low = llm.generate([[5, 6], [5, 300], [-1]], params)
        assert [good.finish_reason, high.finish_reason, low.finish_reason] == ["length", "error", "error"]
        assert "300" in str(high.outputs[0].error)
        assert "-1" in str(low.outputs[0].error)
