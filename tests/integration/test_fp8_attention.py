"""A small Llama through the engine with attention in FP8 arithmetic: by the option, and with a stored scale of queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from paddock import LLM, SamplingParams
from paddock.cli.main import cli
from paddock.errors import PlanError
from paddock.evaluation.scoring import scored
from paddock.testing.contracts import build_model, checkpoint
from paddock_llama.plugin import paddock_models

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
FP8: dict[str, Any] = {"kv_cache_dtype": "fp8", "attention_compute": "fp8"}
PROMPT = list(range(3, 40))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder with a model of random weights."""
    (spec,) = paddock_models()
    made = build_model(spec, CONFIG, seed=4).model
    kept = {name: tensor for name, tensor in checkpoint(made).items() if not name.endswith("_scale")}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def logits(folder: Path, **options: Any) -> torch.Tensor:
    """Return the logits of the prompt's tokens [T, V]."""
    rows: list[torch.Tensor] = []
    with (
        LLM(folder, device="cpu", tokenizer="none", progress=False, kv_cache_memory_bytes=1 << 20, **options) as llm,
        llm.watching_prompts(lambda _, position, rows_RV: rows.append(rows_RV.clone())),
    ):
        list(scored(llm, [PROMPT]))
    return torch.cat(rows)


def test_the_option_rounds_what_attention_multiplies(model: Path) -> None:
    """Logits differ from those over FP8 pages alone by a little, and are the same each time."""
    plain, fp8, again = (logits(model, **options) for options in ({"kv_cache_dtype": "fp8"}, FP8, FP8))
    assert torch.equal(fp8, again)
    assert 0 < (fp8 - plain).norm() < 0.1 * plain.norm()


def test_a_stored_scale_of_queries_is_used(model: Path) -> None:
    """One that is far too small clips queries; without FP8 arithmetic it changes nothing."""
    before = {str(options): logits(model, **options) for options in (FP8, {"kv_cache_dtype": "fp8"})}
    file = model / "model.safetensors"
    scales = {f"model.layers.{i}.self_attn.q_scale": torch.tensor([1e-4]) for i in range(2)}
    save_file(load_file(file) | scales, file)
    after = {str(options): logits(model, **options) for options in (FP8, {"kv_cache_dtype": "fp8"})}
    same = [torch.equal(before[key], after[key]) for key in before]
    assert same == [False, True]


def test_a_model_refuses_fp8_arithmetic_over_plain_keys(model: Path) -> None:
    """Before anything is loaded, with the way out; and the command line has the option."""
    with pytest.raises(PlanError, match="attention_compute is 'fp8'") as error:
        LLM(model, device="cpu", tokenizer="none", attention_compute="fp8")
    assert "kv_cache_dtype" in error.value.fix
    words = ["plan", str(model), "--kv-cache-dtype", "fp8", "--attention-compute", "fp8", "--explain"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "attention_compute" in result.output
    assert "perplexity" in result.output


def test_random_weights_have_no_scale_of_queries(model: Path) -> None:
    """So each token and head has its own, and tokens come."""
    with LLM(model, device="cpu", tokenizer="none", progress=False, load_format="dummy", **FP8) as llm:
        (answer,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert len(answer.token_ids) == 3
