"""The gate: perplexity before and after, on text that calibration never read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from paddock.checkpoint.source import MANIFEST
from paddock.config import EngineConfig
from paddock.errors import OptionError, PlanError, QualityError
from paddock.planning.hardware import parse_gpus
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.quantize import gate
from paddock.quantize.options import QuantizeOptions, parse_gate
from paddock.quantize.stack import LayerStack
from paddock.quantize.text import read_text
from paddock.testing.text import byte_level_tokenizer
from tests.quantize.made import TEXT, random_llama, run, write_model


def test_the_gate_measures_both_models_on_what_calibration_did_not_read(llama: Path, tmp_path: Path) -> None:
    """The last fifth of the text; both figures and their growth are in the manifest."""
    text = str(llama.parent / "text.txt")
    manifest = run(llama, tmp_path / "out", "fp8-official", gate=10.0, calibration=text)
    found = manifest.gate
    held_out = read_text(text).kept_apart.words
    assert TEXT.endswith(held_out)
    assert len(held_out) == pytest.approx(len(TEXT) / 5, abs=20)
    tokens = len(byte_level_tokenizer().encode(held_out))
    windows = -(-tokens // 63)
    assert found["before"]["tokens"] == found["after"]["tokens"] == tokens - windows
    assert found["growth"] == found["after"]["perplexity"] / found["before"]["perplexity"] - 1
    assert found["before"] != found["after"]
    assert manifest.status == "complete"


def test_a_text_of_its_own_may_be_given(llama: Path, tmp_path: Path) -> None:
    """It is read whole."""
    (tmp_path / "held.txt").write_text(TEXT[:300])
    manifest = run(llama, tmp_path / "out", "fp8-official", gate=10.0, gate_text=tmp_path / "held.txt")
    assert (manifest.gate["part"], manifest.gate["text"], manifest.gate["bytes"]) == ("all", "held.txt", 300)


def test_the_gate_keeps_keys_and_values_in_what_scales_were_asked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a format that cannot announce KV scales too, going on included; under strict their silence is no obstacle."""
    monkeypatch.setenv("PADDOCK_STRICT", "1")
    held = tmp_path / "held.txt"
    held.write_text(TEXT[:300])
    plain = run(llama, tmp_path / "plain", "fp8-official", gate=10.0, gate_text=held).gate
    asked: dict[str, Any] = {"gate": 10.0, "gate_text": held, "kv_cache_dtype": "fp8", "calibration": "default", "samples": 2}
    with monkeypatch.context() as patch:
        patch.setattr(LayerStack, "load", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "kept", "fp8-official", **asked)
    kept = run(llama, tmp_path / "kept", "fp8-official", **asked).gate
    assert plain["before"] == kept["before"]
    assert (plain["before"]["kv_cache_dtype"], plain["after"]["kv_cache_dtype"]) == ("float32", "float32")
    assert kept["after"]["kv_cache_dtype"] == "fp8"
    assert kept["after"]["perplexity"] != plain["after"]["perplexity"]
    assert kept["after"] == gate.measure(
        str(tmp_path / "kept"),
        EngineConfig(model=str(llama), device="cpu"),
        read_text(str(held)).words,
        plugins=(),
        autoload=True,
        kv_cache_dtype="fp8",
    )


def test_whether_a_gate_can_be_measured_is_asked_of_keys_and_values_in_fp8(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no attention backend here keeps them so, nothing is written."""

    def serving_plain_keys(config: EngineConfig, *arguments: Any, **options: Any) -> Plan:
        if config.kv_cache_dtype == "fp8":
            raise PlanError("no attention backend keeps KV in fp8")
        return resolve(config, *arguments, **options)

    monkeypatch.setattr(gate, "planned", serving_plain_keys)
    with pytest.raises(PlanError, match="could not measure the quantised model: no attention backend keeps KV in fp8"):
        run(llama, tmp_path / "out", "fp8-official", gate=10.0, kv_cache_dtype="fp8")
    assert not (tmp_path / "out").exists()
    (tmp_path / "held.txt").write_text(TEXT[:300])
    assert run(llama, tmp_path / "out", "fp8-official", gate=10.0, gate_text=tmp_path / "held.txt").status == "complete"


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every quantised model 2% worse than its source; return what is measured."""
    measured: list[str] = []

    def measure(folder: str, *arguments: Any, **options: Any) -> dict[str, float]:
        measured.append(Path(folder).name)
        return {"tokens": 10, "nats": 1.0, "perplexity": 10.0 if measured[-1] == "llama" else 10.2}

    monkeypatch.setattr(gate, "measure", measure)
    return measured


def test_a_model_that_is_worse_than_allowed_fails_and_is_kept_marked(llama: Path, tmp_path: Path, worse: list[str]) -> None:
    """The error has both figures; the folder is whole, and its manifest says failed."""
    with pytest.raises(QualityError, match=r"grown by 2\.00%, from 10\.000 to 10\.200; the gate allows 1\.00%"):
        run(llama, tmp_path / "out", "fp8-official", gate=0.01)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["status"] == "failed"
    assert (tmp_path / "out/config.json").exists()
    assert worse == ["llama", "out"]


def test_a_model_within_the_limit_passes(llama: Path, tmp_path: Path, worse: list[str]) -> None:
    """Growth of exactly what is allowed is allowed."""
    assert run(llama, tmp_path / "out", "fp8-official", gate=0.021).status == "complete"


def test_a_perplexity_that_is_no_number_fails() -> None:
    """NaN compares with nothing, and must not pass for that."""
    found = {"limit": 0.5, "before": {"perplexity": 10.0}, "after": {"perplexity": math.nan}}
    with pytest.raises(QualityError):
        gate.require_passed(Path("out"), found)


def test_a_gate_nothing_can_measure_is_refused_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no installed plugin reads the format that the recipe writes."""
    monkeypatch.setattr("paddock_quant_fp8.detect.detect_fbgemm", lambda facts: None)
    with pytest.raises(PlanError, match="no gate can measure it"):
        run(llama, tmp_path / "out", "fp8-official", gate=0.01)
    assert not (tmp_path / "out").exists()


def test_a_gate_that_no_device_here_can_measure_is_refused_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU without FP8 can make an FP8 model and not run it: said first, with the reason and the way out."""
    monkeypatch.setattr("paddock.quantize.job.detect_hardware", lambda config: parse_gpus("A100"))
    with pytest.raises(PlanError, match=r"the gate could not measure .* needs compute capability 8\.9, .* has 8\.0") as raised:
        run(llama, tmp_path / "out", "fp8-official", gate=0.01)
    assert raised.value.fix.endswith("or leave the gate out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def layers_begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the layers that were begun."""
    begun: list[int] = []
    load = LayerStack.load

    def watched(self: LayerStack, index: int) -> Any:
        begun.append(index)
        return load(self, index)

    monkeypatch.setattr(LayerStack, "load", watched)
    return begun


@pytest.mark.parametrize("words", ["", "\n"])
def test_a_text_too_short_for_the_gate_is_refused_before_the_first_layer(
    llama: Path, tmp_path: Path, layers_begun: list[int], words: str
) -> None:
    """Nothing is written either, so that a longer one can be given."""
    (tmp_path / "held.txt").write_text(words)
    with pytest.raises(OptionError, match=r"held\.txt' has \d tokens? \(all\), too few to predict") as raised:
        run(llama, tmp_path / "out", "fp8-official", gate=0.01, gate_text=tmp_path / "held.txt")
    assert "--gate-text" in raised.value.fix
    assert layers_begun == []
    assert not (tmp_path / "out").exists()


def test_a_text_in_tokens_that_the_model_does_not_know_is_refused_before_the_first_layer(
    tmp_path: Path, layers_begun: list[int]
) -> None:
    """A tokenizer of another model, found without running this one."""
    source = write_model(tmp_path / "plain/llama", random_llama(vocab_size=100))
    with pytest.raises(OptionError, match=r"gives token \d\d\d of the gate's text, and the model knows 100"):
        run(source, tmp_path / "out", "fp8-official", gate=0.01)
    assert layers_begun == []
    assert not (tmp_path / "out").exists()


def test_a_plain_model_without_a_perplexity_is_refused_before_the_first_layer(tmp_path: Path, layers_begun: list[int]) -> None:
    """Its logits are not finite: no limit could hold the quantised model to it."""
    model = random_llama()
    model.model.norm.weight[0] = float("nan")
    source = write_model(tmp_path / "plain/llama", model)
    with pytest.raises(QualityError, match="llama has no perplexity on the gate's text"):
        run(source, tmp_path / "out", "fp8-dynamic", gate=0.01)
    assert layers_begun == []
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["gate"] == {}


def test_a_quantised_model_without_a_perplexity_fails(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is kept, marked failed."""
    measure = gate.measure

    def spoilt(folder: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        if Path(folder).name == "out":
            raise QualityError("not finite")
        return measure(folder, *arguments, **options)

    monkeypatch.setattr(gate, "measure", spoilt)
    with pytest.raises(QualityError, match="grown by nan%"):
        run(llama, tmp_path / "out", "fp8-official", gate=10.0)
    written = json.loads((tmp_path / "out" / MANIFEST).read_text(), parse_constant=pytest.fail)
    assert (written["status"], written["gate"]["after"]["perplexity"], written["gate"]["growth"]) == ("failed", None, None)


def test_a_run_that_goes_on_does_not_measure_the_plain_model_again(
    llama: Path, tmp_path: Path, worse: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the manifest, whatever limit is asked for; on another text it is measured anew."""
    (tmp_path / "held.txt").write_text(TEXT[:300])
    with monkeypatch.context() as patch:
        patch.setattr(LayerStack, "load", _interrupt)
        for options in ({"gate": 0.01}, {"gate": 0.03}, {"gate": 0.03, "gate_text": tmp_path / "held.txt"}):
            with pytest.raises(KeyboardInterrupt):
                run(llama, tmp_path / "out", "fp8-official", **options)
    assert worse == ["llama", "llama"]
    manifest = run(llama, tmp_path / "out", "fp8-official", gate=0.04, gate_text=tmp_path / "held.txt")
    assert worse == ["llama", "llama", "out"]
    assert (manifest.gate["limit"], manifest.gate["text"], manifest.status) == (0.04, "held.txt", "complete")


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("value", [math.nan, math.inf, "ppl<=1%", True])
def test_a_limit_that_is_no_share_is_refused(value: Any) -> None:
    """NaN would let nothing pass, a text would fail at the end."""
    with pytest.raises(OptionError, match="gate is") as raised:
        QuantizeOptions(recipe="awq", out=Path("out"), gate=value)
    assert "0.01" in raised.value.fix


@pytest.mark.parametrize(("text", "share"), [("ppl<=1%", 0.01), ("ppl <= 0.5 %", 0.005), ("ppl<=0%", 0.0)])
def test_a_gate_is_read_as_written(text: str, share: float) -> None:
    """Spaces do not matter."""
    assert parse_gate(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["ppl<1%", "ppl<=1", "mmlu>=50%", ""])
def test_a_gate_of_another_form_is_refused(text: str) -> None:
    """With the form to write."""
    with pytest.raises(OptionError, match="gate is") as raised:
        parse_gate(text)
    assert "ppl<=1%" in raised.value.fix


def test_a_4_bit_model_that_loses_too_much_fails(llama: Path, tmp_path: Path) -> None:
    """A gate of nothing at all: the figures are said, and the folder is kept, marked failed."""
    text = str(llama.parent / "text.txt")
    with pytest.raises(QualityError, match="perplexity has grown by") as raised:
        run(llama, tmp_path / "out", "awq", gate=-0.9, calibration=text)
    assert "another recipe" in raised.value.fix
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["status"] == "failed"
