"""The table of what 4-bit weights cost beside other tools' own, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paddock.evaluation import Comparison
from tests.bench import int4_references
from tests.bench.awq_quality import COMPUTED, LAYOUTS, Int4Row, Int4Settings, main, printed, table
from tests.bench.fp8_quality import Settings
from tests.bench.quality_rows import Row
from tests.quantize.made import LINEARS, logits_of, sequences
from tests.quantize.test_awq import GROUP, PATHS

pytestmark = pytest.mark.bench


def rows_of(llama: Path, folder: Path, *, weights: tuple[str, ...] = (), references: tuple[str, ...] = ()) -> list[Int4Row]:
    """Return the rows for 12 windows of 24 tokens that the plain model writes."""
    texts = Settings(calibration=str(llama.parent / "text.txt"), text="generated", windows=12, window=24, samples=6)
    return list(table(llama, Int4Settings(texts=texts, group_size=GROUP, weights=weights, references=references), folder))


def test_every_layout_is_held_to_the_plain_model(llama: Path, tmp_path: Path) -> None:
    """FP8 inputs cost something on top of the weights, and zero points save something; without searches it is another model."""
    first, *rest = rows_of(llama, tmp_path, weights=(*LAYOUTS, "plain-rounding:compressed-tensors"))
    assert (first.quality.growth.share, first.quality.top1, first.quality.kl) == (0, 1, 0)
    found = {(row.quality.recipe, row.computes): row.quality.kl for row in rest}
    assert all(found[layout, "w4a16"] < found[layout, "w4a8"] for layout in LAYOUTS if "w4a8" in COMPUTED[layout])
    assert found["compressed-tensors", "w4a16"] < found["compressed-tensors-symmetric", "w4a16"]
    assert found["compressed-tensors", "w4a16"] != found["plain-rounding:compressed-tensors", "w4a16"]


def test_modelopts_weights_as_a_plain_checkpoint_are_its_simulation(llama: Path, tmp_path: Path) -> None:
    """The checkpoint's logits are those of the model it was taken from."""
    pytest.importorskip("modelopt.torch.quantization")
    out = int4_references.modelopt(llama, tmp_path / "out", sequences(), GROUP)
    simulated = int4_references.modelopt_simulated(llama, sequences(), GROUP, "INT4_AWQ_CFG")
    with torch.inference_mode():
        expected = simulated(sequences()).logits
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-4)


def test_autoawqs_weights_are_sixteen_numbers_a_group(llama: Path, tmp_path: Path) -> None:
    """Of every linear, and its norms are divided; what the search wrote over is restored, so no weight has grown."""
    pytest.importorskip("awq.quantize.quantizer")
    found = load_file(int4_references.autoawq(llama, tmp_path / "out", sequences(), GROUP) / "model.safetensors")
    source = load_file(llama / "model.safetensors")
    for path in PATHS:
        groups = found[f"{path}.weight"].view(-1, GROUP)
        assert max(len(group.unique()) for group in groups) <= 16
        ratio = found[f"{path}.weight"].norm() / source[f"{path}.weight"].norm()
        assert 0.5 < ratio < 2, (path, ratio)
    assert not torch.equal(found["model.layers.0.input_layernorm.weight"], source["model.layers.0.input_layernorm.weight"])
    assert len(PATHS) == len(LINEARS) * 4


def test_paddock_is_no_further_from_the_plain_model_than_other_tools(llama: Path, tmp_path: Path) -> None:
    """By KL, as W4A16 and as W4A8; growth of perplexity says little of a random model, which predicts nothing."""
    pytest.importorskip("modelopt.torch.quantization")
    pytest.importorskip("awq.quantize.quantizer")
    _, *rows = rows_of(llama, tmp_path, weights=("compressed-tensors",), references=("autoawq", "modelopt"))
    kl = {(row.quality.library, row.computes): row.quality.kl for row in rows}
    assert 0 < kl["paddock", "w4a16"] <= min(kl["autoawq", "w4a16"], kl["modelopt", "w4a16"]), kl
    assert kl["paddock", "w4a16"] < kl["paddock", "w4a8"] <= kl["modelopt", "w4a8"], kl


def test_the_command_prints_a_table_and_keeps_what_it_made(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a row; a second run takes the checkpoint that is there."""
    asked = [
        "--group-size",
        str(GROUP),
        "--calibration",
        str(llama.parent / "text.txt"),
        "--text",
        "generated",
        "--device",
        "cpu",
    ]
    asked += ["--windows", "2", "--window", "24", "--samples", "6", "--weights", "autoawq", "--keep", str(tmp_path / "kept")]
    assert main([str(llama), *asked]) == 0
    first = capsys.readouterr().out
    kept = tmp_path / "kept/paddock-autoawq/config.json"
    written = kept.stat().st_mtime_ns
    assert main([str(llama), *asked]) == 0
    assert capsys.readouterr().out == first
    assert kept.stat().st_mtime_ns == written
    assert [line.split(" | ")[1:3] for line in first.splitlines()[2:]] == [["as they are", "float32"], ["autoawq", "w4a16"]]


def test_paddocks_rows_stand_beside_the_tools_that_compute_alike() -> None:
    """A line for each pair, from the windows of both; none for the plain row, nor across ways to compute."""

    def row(library: str, recipe: str, computes: str, more: float) -> Int4Row:
        found = [
            Comparison(tokens=9, windows=1, kl=0.1, kl_max=0.2, top1=0.9, nats_a=2.0, nats_b=2.0 + more * each) for each in (1, 2)
        ]
        quality = Row.of(found, model="llama", library=library, recipe=recipe, kv="float32")
        return Int4Row(computes=computes, quality=quality, accuracies=(0.5, None))

    rows = [
        row("paddock", "as they are", "float32", 0),
        row("paddock", "autoawq", "w4a16", 0.01),
        row("paddock", "ct", "w4a8", 0.01),
    ]
    text = printed([*rows, row("autoawq", "its own search", "w4a16", 0.02)], ("piqa", "boolq"))
    table, said = text.split("\n\n")
    lines = table.splitlines()
    assert {line.count("|") for line in lines} == {11}
    assert lines[3].endswith("| 0.500 |  |")
    assert said == ("growth of autoawq as w4a16 is -1.489% ± 0.493% from that of autoawq, ± one standard error over 2 windows")


def test_a_group_that_does_not_fit_is_one_error(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every linear that it does not fit, and the group sizes that do."""
    asked = ["--group-size", "128", "--calibration", str(llama.parent / "text.txt"), "--text", "generated", "--device", "cpu"]
    assert main([str(llama), *asked, "--windows", "2", "--window", "24", "--samples", "6"]) == 1
    said = capsys.readouterr().err
    assert "error: group_size is 128, and self_attn.q_proj, self_attn.k_proj, " in said
    assert " have 64 inputs: 0.5 groups; mlp.down_proj has 96 inputs: 0.75 groups" in said
