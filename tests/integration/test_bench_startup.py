"""`paddock bench` on a real engine: a tiny Llama with random weights, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddock.bench.startup import DEFINITIONS
from paddock.cli.main import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return a model folder."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_a_start_is_timed_phase_by_phase(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every phase of a real start is known, they follow each other, and the process said what it ran."""
    words = ["bench", "startup", model, "--device", "cpu", "--load-format", "dummy", "--kernel-cache", "empty", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(report[name] is not None for name in DEFINITIONS)
    phases = [report[f"{name}_seconds"] for name in ("python", "imports", "plan", "weights", "ready")]
    assert sum(phases) <= report["accepted_seconds"] <= report["first_token_seconds"]
    assert report["plan"]["attention_backend"] == "torch"
    assert report["weight_bytes"] > 0


def test_a_start_that_fails_says_why_and_how_to_mend_it(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error of the process is the command's own."""
    assert main(["bench", "startup", model, "--device", "cpu", "--load-format", "dummy", "--max-model-len", "4000"]) == 1
    said = capsys.readouterr().err
    assert "max_model_len is 4000" in said
    assert "fix:" in said


def test_a_report_names_the_plan_and_its_bytes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Throughput of a planned model says what the plan chose, which plugins it took, and, when asked, the ledger."""
    words = ["--requests", "2", "--isl", "40", "--osl", "3", "--device", "cpu", "--load-format", "dummy", "--ledger", "--json"]
    assert main(["bench", "throughput", model, *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["dtype"] in ("bfloat16", "float32")
    assert "paddock-llama" in report["versions"]
    assert report["ledger"]["entries"]["weights"]["predicted"] > 0
    assert report["roof"]["none_because"]
