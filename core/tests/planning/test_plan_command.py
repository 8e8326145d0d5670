"""`paddock plan`: tables, JSON and exit codes, from config.json alone and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from core.tests.planning.made import CONFIGS, published

from paddock.cli.main import main
from paddock.planning.serial import from_json

pytest.importorskip("paddock_llama")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Return a model folder with nothing but the config.json of Llama 3.1 8B."""
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-8b.json").read_text())
    return tmp_path


def test_a_plan_that_can_run_is_shown_and_exits_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has the choices, GiB, bytes a token, pages and tokens."""
    assert main(["plan", str(folder), "--gpus", "H200"]) == 0
    out = capsys.readouterr().out
    for shown in ("NVIDIA H200", "bfloat16", "GiB", "14.958", "131,072 bytes a token", "sequences of 131,072", "It can run."):
        assert shown in out


def test_a_plan_that_cannot_run_is_shown_and_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By how much it does not fit is in the table, what would do is in the error."""
    assert main(["plan", str(folder), "--gpus", "L4", "--max-model-len", "131072"]) == 1
    captured = capsys.readouterr()
    assert "missing" in captured.out
    assert "It cannot run so." in captured.out
    assert "too little" in captured.err
    assert "2 GPUs" in captured.err


def test_the_file_itself_may_be_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path to config.json is its folder."""
    assert main(["plan", str(folder / "config.json"), "--gpus", "H200"]) == 0
    assert "It can run." in capsys.readouterr().out


def test_options_reach_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for on the command line is in the JSON, whose plan reads back."""
    words = ["--dtype", "float16", "--max-model-len", "4096", "--max-num-seqs", "8", "--kv-cache-dtype", "fp8"]
    assert main(["plan", str(folder), "--gpus", "H200", "--json", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    plan = from_json(json.dumps(report["plan"]))
    assert (plan.dtype, plan.max_model_len, plan.max_num_seqs, plan.kv_cache_dtype) == ("float16", 4096, 8, "fp8")
    assert report["runnable"]
    assert report["weight_bytes"] == plan.weight_bytes


def test_a_weight_that_large_steps_round_is_a_line_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is one: gate and up of 28,672 x 4,096 bytes, or all that are kept; every other plan is without the line."""
    pytest.importorskip("paddock_quant_awq")
    config = json.loads((folder / "config.json").read_text())
    entry = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    lines = {"a weight in FP8": "0.109", "FP8 copies": "6.500"}
    for options, there in ((["w8a8"], "a weight in FP8"), (["w8a8", "--keep-fp8-weights"], "FP8 copies"), (["w4a8"], None)):
        assert main(["plan", str(folder), "--gpus", "H200", "--int4-compute", *options]) == 0
        out = capsys.readouterr().out
        found = {name: line.split()[-1] for line in out.splitlines() for name in lines if line.startswith(name)}
        assert found == {name: size for name, size in lines.items() if name == there}


def test_ops_are_chosen_by_name_and_owner(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--op` may be given several times; `paddock` is the core."""
    words = ["--op", "rms_norm=paddock", "--op", "gelu=paddock"]
    assert main(["plan", str(folder), "--gpus", "H200", "--json", *words]) == 0
    ops = {op["op"]: op["implementation"] for op in json.loads(capsys.readouterr().out)["plan"]["ops"]}
    assert (ops["rms_norm"], ops["gelu"]) == ("paddock.layers.reference:rms_norm", "paddock.layers.reference:gelu")


def test_json_of_a_plan_that_cannot_run_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is one JSON object, whatever the verdict."""
    assert main(["plan", str(folder), "--gpus", "2xL4", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["runnable"]
    assert report["issues"]


def test_explain_shows_reasons_and_what_was_rejected(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each choice has its reason; rejected candidates have theirs."""
    assert main(["plan", str(folder), "--gpus", "H200", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "the dtype the checkpoint was saved in" in out
    assert "not float16" in out


def test_this_cpu_can_be_planned_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--device cpu` needs no GPU's name."""
    main(["plan", str(folder), "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["plan"]["hardware"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--gpus", "H300"], 2, "H300"),
        (["--gpus", "H200", "--device", "cpu"], 2, "give one of the two"),
        (["--gpus", "H200", "--max-model-len", "0"], 2, "max_model_len is 0"),
        (["--gpus", "H200", "--dtype", "int3"], 2, "int3"),
        (["--gpus", "H200", "--max-model-len", "200000"], 1, "131072"),
        (["--gpus", "H200", "--attention-backend", "flash"], 1, "flash"),
        (["--gpus", "H200", "--op", "rms_norm"], 2, "--op is 'rms_norm'"),
        (["--gpus", "H200", "--op", "gelu=a", "--op", "gelu=b"], 2, "--op gives 'gelu' to 'a' and to 'b'"),
        (["--gpus", "H200", "--op", "rms_nrom=paddock"], 2, "did you mean 'rms_norm'?"),
        (["--gpus", "H200", "--op", "rms_norm=nobody"], 2, "wants 'rms_norm' from 'nobody'"),
    ],
)
def test_wrong_options_are_one_readable_block(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    """Wrong usage exits with 2, a wrong plan with 1; the value is quoted and no traceback shown."""
    assert main(["plan", str(folder), *words]) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_strict_makes_a_warning_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shortened context is a warning, and under --strict refused."""
    (tmp_path / "config.json").write_text(json.dumps(published("llama-3.1-8b")))
    words = ["plan", str(tmp_path), "--gpus", "L4"]
    assert main(words) == 0
    assert "warning: sequences end at" in capsys.readouterr().out
    assert main([*words, "--strict"]) == 1


def test_unknown_keys_are_named_and_can_be_let_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.json key the model does not know is an error that says how to ignore it."""
    (tmp_path / "config.json").write_text(json.dumps(published("llama-3.1-8b") | {"new_trick": 3}))
    assert main(["plan", str(tmp_path), "--gpus", "H200"]) == 1
    assert "new_trick" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--gpus", "H200", "--ignore-config-keys", "new_trick"]) == 0


def test_planning_imports_no_torch(folder: Path) -> None:
    """A plan for named GPUs, or for a CPU, is made by a process that never imports torch, numpy or transformers."""
    code = (
        "import sys\n"
        "from paddock.cli.main import main\n"
        f"main(['plan', {str(folder)!r}, '--gpus', '2xH200', '--json'])\n"
        f"main(['plan', {str(folder)!r}, '--device', 'cpu', '--explain'])\n"
        "heavy = sorted({'torch', 'numpy', 'transformers', 'triton'} & sys.modules.keys())\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
