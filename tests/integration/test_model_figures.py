"""The benchmark that fills the pages of models and start-up: that its rows can be planned, and what it keeps, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from attrs import evolve
from click.testing import CliRunner
from core.tests.planning.made import published

from paddock.cli.main import main as paddock
from paddock.config import EngineConfig
from tests.bench import model_figures
from tests.bench.model_figures import KEPT, ROWS, Row, chosen, lines, throughput

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
FLAGS = ("--ledger", *KEPT)


def tiny(row: Row) -> Row:
    """Return a row of a model that a CPU runs."""
    return evolve(row, config=row.config | TINY)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no row find a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_s_options_are_planned_for_one_h200(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own config.json, and room for at least one of its sequences."""
    row.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    planned = {f"--{name.replace('_', '-')}" for name in EngineConfig.__annotations__}
    options = iter(row.options)
    pairs = [(name, *(() if name in FLAGS else (next(options),))) for name in options]
    given = [part for pair in pairs if pair[0] in planned for part in pair]
    assert paddock(["plan", row.folder, "--gpus", "1xH200", "--load-format", "dummy", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["full_sequences"] >= 1
    assert {"--max-model-len"} <= {pair[0] for pair in pairs if pair[0] in planned}


def test_each_row_is_named_once() -> None:
    """Its name is its file's."""
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_measured_row_is_kept_and_not_measured_again(tmp_path: Path) -> None:
    """Its file is what `paddock bench` printed, with the command that a reader can run."""
    row = tiny(throughput("tiny", "llama-3.1-8b", "2x8/4", "--kv-cache-memory-bytes", "16777216"))
    ((line, well),) = lines([row], 1, "abc1234", tmp_path / "out")
    assert well, line
    report = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert (report["model"], report["requests"], report["commit"]) == ("llama-3.1-8b", 2, "abc1234")
    assert report["command"] == " ".join(["paddock", *row.command(1, "abc1234")])
    assert line.startswith(f"tiny: {report['output_tokens_per_second']:,.1f} tokens/s in ")
    ((again, well),) = lines([evolve(row, bench="no such thing")], 1, None, tmp_path / "out")
    assert well
    assert "kept" in again


def test_a_row_that_fails_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    """And leaves no file."""
    good = tiny(throughput("good", "llama-3.1-8b", "1x8/4", "--kv-cache-memory-bytes", "16777216"))
    bad = evolve(good, name="bad", options=(*good.options, "--dtype", "float7"))
    first, second = lines([bad, good], 1, None, tmp_path)
    assert not first[1]
    assert "float7" in first[0]
    assert second[1], second[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["good.json"]


def test_words_choose_rows_and_an_unknown_one_is_said() -> None:
    """With the names there are."""
    assert [row.name for row in chosen(("falcon-64",))] == ["falcon-64x128", "falcon-64x128-fast"]
    with pytest.raises(click.BadParameter, match="--only 90b names no row; there are 8b-1x128, "):
        chosen(("falcon", "90b"))


def test_list_prints_commands_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are whole: what a shell can run where the folder is."""
    monkeypatch.setattr(model_figures, "lines", None)
    arguments: list[Any] = [tmp_path / "none", "--only", "falcon-128x2048", "--list"]
    found = CliRunner().invoke(model_figures.main, [str(argument) for argument in arguments])
    assert found.output == (
        "falcon-128x2048: paddock bench throughput falcon-180b-awq-4096 --load-format dummy --tokenizer none --requests 128"
        " --isl 128 --osl 2048 --max-model-len 2240 --kv-cache-dtype fp8 --int4-compute w8a8 --ledger --runs 3 --json\n"
    )
    assert not (tmp_path / "none").exists()
    assert published("falcon-180b-awq")["max_position_embeddings"] == 2048
