"""The table of what FP8 recipes cost, on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.fp8_quality import RECIPES, Settings, main, table
from tests.quantize.made import TEXT

pytestmark = pytest.mark.bench


def settings(llama: Path, *, windows: int = 4, reference: str | None = None) -> Settings:
    """Return settings of windows of 24 tokens, generated."""
    calibration = str(llama.parent / "text.txt")
    return Settings(calibration=calibration, text="generated", windows=windows, window=24, samples=6, reference=reference)


def test_every_recipe_is_held_to_the_plain_model(llama: Path) -> None:
    """With and without FP8 keys and values; each is away from the plain model, and fewer FP8 linears are nearer."""
    rows = {(row.recipe, row.kv): row for row in table(llama, settings(llama))}
    plain = rows.pop(("plain", "float32"))
    assert (plain.growth.share, plain.growth.error, plain.top1, plain.kl) == (0, 0, 1, 0)
    assert list(rows) == [(recipe, kv) for recipe in RECIPES for kv in ("float32", "fp8")]
    for row in rows.values():
        assert 1e-6 < row.kl <= row.kl_max < 1
        assert 0.5 < row.top1 <= 1
        assert row.perplexity == pytest.approx(plain.perplexity * (1 + row.growth.share), rel=1e-9)
    assert rows["fp8-official", "float32"].kl < rows["fp8-dynamic", "float32"].kl
    assert len({row.kl for row in rows.values()}) == len(rows)


def test_generated_windows_are_the_same_again(llama: Path) -> None:
    """Their seeds are fixed."""
    first, again = (next(iter(table(llama, settings(llama)))) for _ in range(2))
    assert first == again


def test_a_text_that_calibration_read_is_refused(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its tokens, whatever the file is called."""
    same = llama.parent / "same.txt"
    same.write_text(TEXT)
    code = main(
        [str(llama), "--calibration", str(llama.parent / "text.txt"), "--text", str(same), "--samples", "2", "--device", "cpu"]
    )
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert f"error: the text {str(same)!r} has 32 tokens in a row" in captured.err
    assert "fix: evaluate on another text" in captured.err


def test_the_command_prints_a_table_and_json(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table holds a line a row of those asked for; the JSON says settings and versions too."""
    asked = ["--calibration", str(llama.parent / "text.txt"), "--text", "generated", "--samples", "6", "--device", "cpu"]
    asked += ["--recipes", "fp8-dynamic", "fp8-official", "--kv", "fp8"]
    assert main([str(llama), *asked, "--windows", "2", "--window", "24", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    lines = capsys.readouterr().out.splitlines()[2:]
    assert found["differences"] == []
    assert [len(row["windows"]) for row in found["rows"]] == [2, 2, 2]
    assert all(row["growth"]["error"] > 0 for row in found["rows"][1:])
    assert [line.split(" | ")[2] for line in lines] == [row["recipe"] for row in found["rows"]]
    assert [(row["recipe"], row["kv"]) for row in found["rows"][1:]] == [("fp8-dynamic", "fp8"), ("fp8-official", "fp8")]
    assert found["settings"]["llama"]["windows"] == 2
    assert {"paddock", "torch"} <= found["machine"]["versions"].keys()


def test_modelopt_itself_costs_the_same(llama: Path) -> None:
    """Its simulation of FP8_DEFAULT_CFG is as far from the plain model as fp8-static: KL within 1 %, perplexity 0.2 %."""
    pytest.importorskip("modelopt.torch.quantization")
    rows = {(row.recipe, row.kv): row for row in table(llama, settings(llama, windows=32, reference="modelopt"))}
    for kv in ("float32", "fp8"):
        ours, theirs = rows["fp8-static", kv], rows["FP8_DEFAULT_CFG", kv]
        assert (ours.library, theirs.library) == ("paddock", "modelopt")
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=2e-3)
        assert ours.kl == pytest.approx(theirs.kl, rel=0.01)
