"""The command line of `paddock quantize`: what it takes, makes, says and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paddock.checkpoint.source import MANIFEST
from paddock.cli.main import main
from paddock.errors import QualityError
from paddock.quantize import gate


def test_the_command_writes_the_model_and_says_what_it_made(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for the folder, one for the gate."""
    text = str(llama.parent / "text.txt")
    words = ["quantize", str(llama), "--recipe", "fp8-official", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--gate", "ppl<=1000%", "--calibration", text]) == 0
    shown = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 4 layers by fp8-official, " in shown.out
    assert re.search(r"^perplexity \S+ before, \S+ after: ", shown.out, re.MULTILINE)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "fbgemm_fp8"


@pytest.mark.parametrize("recipe", ["fp8-static", "fp8-dynamic", "fp8-official"])
@pytest.mark.parametrize("kv_cache", [[], ["--kv-cache", "fp8"]])
def test_every_recipe_takes_a_calibration_text(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, kv_cache: list[str]
) -> None:
    """Where nothing reads it a warning says so, the manifest names none, and the result is the one without it."""
    text = str(llama.parent / "text.txt")
    words = ["quantize", str(llama), "--recipe", recipe, *kv_cache, "--device", "cpu"]
    assert main([*words, "--calibration", text, "--out", str(tmp_path / "out")]) == 0
    unread = recipe != "fp8-static" and not kv_cache
    assert ("calibration_not_read" in capsys.readouterr().err) is unread
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["made_from"]["calibration"] is None) is unread
    if unread:
        assert main([*words, "--out", str(tmp_path / "without")]) == 0
        assert json.loads((tmp_path / "without" / MANIFEST).read_text()) == manifest
    assert "calibration_not_read" not in capsys.readouterr().err


def test_a_calibration_text_that_the_gate_reads_is_not_unread(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a text of its own it is."""
    text = llama.parent / "text.txt"
    words = [
        "quantize",
        str(llama),
        "--recipe",
        "fp8-dynamic",
        "--device",
        "cpu",
        "--calibration",
        str(text),
        "--gate",
        "ppl<=1000%",
    ]
    assert main([*words, "--out", str(tmp_path / "read")]) == 0
    assert "calibration_not_read" not in capsys.readouterr().err
    assert main([*words, "--gate-text", str(text), "--out", str(tmp_path / "unread")]) == 0
    assert "calibration_not_read" in capsys.readouterr().err


def test_the_command_says_in_what_keys_and_values_were_kept(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the plain model kept them in something else; in the error of a gate that fails too."""
    words = [
        "quantize",
        str(llama),
        "--recipe",
        "fp8-official",
        "--kv-cache",
        "fp8",
        "--calibration",
        "default",
        "--samples",
        "2",
        "--gate-text",
        str(tmp_path / "held.txt"),
    ]
    (tmp_path / "held.txt").write_text("It was the best of times, it was the worst of times. " * 6)
    assert main([*words, "--device", "cpu", "--gate", "ppl<=1000%", "--out", str(tmp_path / "out")]) == 0
    assert " after with keys and values in fp8: " in capsys.readouterr().out
    found = {"limit": 0.0} | {
        when: json.loads((tmp_path / "out" / MANIFEST).read_text())["gate"][when] for when in ("before", "after")
    }
    found["after"]["perplexity"] = found["before"]["perplexity"] * 1.01
    with pytest.raises(QualityError, match=r"grown by 1\.00%, .* with keys and values in fp8; the gate allows"):
        gate.require_passed(tmp_path / "out", found)


def test_the_command_needs_no_length_for_a_model_of_few_positions(llama: Path, tmp_path: Path) -> None:
    """Sequences are as long as the model takes, and the manifest says so."""
    words = [
        "quantize",
        str(llama),
        "--recipe",
        "fp8-static",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--samples",
        "2",
    ]
    assert main(words) == 0
    calibration = json.loads((tmp_path / "out" / MANIFEST).read_text())["made_from"]["calibration"]
    assert (calibration["samples"], calibration["sequence_length"]) == (2, 64)


def test_the_command_makes_4_bit_models_as_asked(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scheme, layout and groups are options; what they were is in the manifest, and the gate measures the result."""
    words = ["quantize", str(llama), "--recipe", "awq", "--out", str(tmp_path / "out"), "--device", "cpu", "--tp-compatible", "1"]
    words += ["--format", "modelopt", "--scheme", "w4a8", "--calibration", str(llama.parent / "text.txt")]
    assert main([*words, "--samples", "3", "--sequence-length", "24", "--gate", "ppl<=1000%"]) == 0
    assert f"{tmp_path / 'out'}: 4 layers by awq, " in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    asked = {"format": "modelopt", "scheme": "w4a8", "tp_compatible": 1}
    assert {key: manifest["made_from"].get(key) for key in (*asked, "group_size")} == asked | {"group_size": None}
    assert manifest["gate"]["before"] != manifest["gate"]["after"]
    described = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert (described["quant_algo"], described["group_size"]) == ("W4A8_AWQ", 32)


@pytest.mark.parametrize("written", [True, False])
def test_the_command_writes_zero_points_or_leaves_them_out(llama: Path, tmp_path: Path, written: bool) -> None:
    """As asked, whatever the scheme's default is, and the manifest says so."""
    words = ["quantize", str(llama), "--recipe", "awq", "--out", str(tmp_path / "out"), "--device", "cpu", "--group-size", "32"]
    words += ["--scheme", "w4a8" if written else "w4a16", "--zero-points" if written else "--no-zero-points"]
    words += ["--calibration", str(llama.parent / "text.txt"), "--samples", "3", "--sequence-length", "24"]
    assert main(words) == 0
    weights = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["symmetric"] is not written
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["made_from"]["zero_points"] is written


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (["--recipe", "fp8-statik"], 1, "did you mean 'fp8-static'?"),
        (["--gate", "ppl"], 2, "write it as ppl<=1%"),
        (["--samples", "0"], 2, "samples is 0"),
        (["--kv-cache", "int8"], 2, "no scales for a KV cache in 'int8'"),
        (["--group-size", "64"], 2, "leave group_size out"),
        (["--recipe", "awq", "--group-size", "64"], 2, "use --group-size 32"),
        (["--recipe", "awq", "--tp-compatible", "8"], 2, "on each of 8 ranks\n  fix: use --tp-compatible 1"),
        (["--recipe", "awq", "--no-zero-points", "--tp-compatible", "8"], 2, "on each of 8 ranks\n  fix: use --tp-compatible 1"),
        (["--recipe", "awq", "--format", "autoawq", "--scheme", "w4a8"], 2, "or --scheme w4a16"),
    ],
)
def test_the_command_fails_with_one_block(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], code: int, says: str
) -> None:
    """On standard error, and nothing is written."""
    words = ["quantize", str(llama), "--recipe", "fp8-static", "--out", str(tmp_path / "out"), "--device", "cpu", *changes]
    assert main(words) == code
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With who brings them."""
    assert main(["list", "recipes"]) == 0
    names = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in names] == ["recipe", "awq", "fp8-static", "fp8-dynamic", "fp8-official"]
    assert [each[1:] for each in names[1:3]] == [["quant-awq", "paddock-quant-awq"], ["quant-fp8", "paddock-quant-fp8"]]
