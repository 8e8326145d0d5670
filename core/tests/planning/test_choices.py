"""Every `auto` is resolved with a reason and the candidates that were rejected; what was asked for is never replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from core.tests.planning.made import RAW, ComplainingPlugin, MadePlugin, ParallelPlugin, cpu, gpus, planned, registry, source

from paddock.checkpoint.source import ModelSource
from paddock.config import EngineConfig
from paddock.planning.hardware import Hardware
from paddock.planning.resolve import resolve
from paddock.plugins import hookimpl

GROUPED = {"quantization_config": {"quant_method": "grouped"}}


def rejected(plan: Any, name: str) -> Any:
    """Return the rejected candidates of a choice, by value."""
    return {each.value: each.reason for each in plan.choice(name).rejected}


def test_a_gpu_computes_in_the_checkpoints_dtype() -> None:
    """The dtype the weights were saved in is the first candidate."""
    assert planned({"dtype": "float16"}).dtype == "float16"


def test_an_old_gpu_falls_back_from_bfloat16() -> None:
    """A GPU without bfloat16 takes float16, and the plan says why."""
    plan = planned({}, gpus(capability=(7, 5)))
    assert plan.dtype == "float16"
    assert "has no bfloat16" in rejected(plan, "dtype")["bfloat16"]


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_computes_in_what_is_quicker(bf16: Any, dtype: Any) -> None:
    """bfloat16 where the CPU multiplies it itself, else float32, whatever the checkpoint was saved in."""
    assert planned({"dtype": "float16"}, cpu(bf16=bf16)).dtype == dtype


def test_a_format_that_refuses_the_best_dtype_gets_the_next() -> None:
    """The made-up format takes no float32, so a CPU computes it in bfloat16."""
    plan = planned(GROUPED, cpu())
    assert plan.dtype == "bfloat16"
    assert "not float32" in rejected(plan, "dtype")["float32"]


def test_the_format_of_a_checkpoint_is_detected() -> None:
    """The one installed format that recognises the checkpoint is used, and named with its plugin."""
    plan = planned(GROUPED)
    assert plan.quantization is not None
    assert (plan.quantization.name, plan.scheme) == ("grouped", "grouped")
    assert any(used.role == "quantization" for used in plan.plugins)


def test_a_plain_checkpoint_is_not_quantised() -> None:
    """Without a quantisation section the plain scheme is used."""
    assert planned().quantization is None
    assert planned().scheme == "none"


def test_a_gpu_takes_the_backend_of_highest_rank() -> None:
    """The quick backend outranks the plain one, which is recorded as rejected."""
    plan = planned()
    assert plan.attention.name == "quick"
    assert plan.page_size == 64
    assert "rank 0" in rejected(plan, "attention_backend")["torch"]


def test_a_backend_that_cannot_serve_says_why() -> None:
    """Device, features and block size are reasons, and the next one that serves is taken."""
    assert "not on cpu" in rejected(planned({}, cpu()), "attention_backend")["quick"]
    assert "lacks alibi" in rejected(planned({"features": ["alibi"]}), "attention_backend")["quick"]
    plan = planned(block_size=16)
    assert (plan.attention.name, plan.page_size) == ("torch", 16)
    assert "not 16" in rejected(plan, "attention_backend")["quick"]
    assert "needs compute capability 9.0" in rejected(planned({}, gpus(capability=(8, 0))), "attention_backend")["quick"]


FALLBACKS: dict[str, tuple[dict[str, Any], Hardware, dict[str, Any], str, str]] = {
    "old GPU": ({}, gpus(capability=(8, 0)), {}, "needs compute capability 9.0, Made GPU has 8.0", "of compute capability 9.0"),
    "dtype": ({"dtype": "float32"}, gpus(), {}, "takes bfloat16, float16, not float32", "set dtype to bfloat16 or float16"),
    "KV": ({}, gpus(), {"kv_cache_dtype": "fp8"}, "not in fp8", "set kv_cache_dtype to bfloat16 or float16"),
    "page": ({}, gpus(), {"block_size": 16}, "pages of 64, 32 tokens, not 16", "set block_size to one of 64, 32"),
    "feature": ({"features": ["alibi"]}, gpus(), {}, "lacks alibi", "set attention_backend to torch"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_falling_to_a_lower_backend_is_a_warning(name: str) -> None:
    """It names who was to serve, why it does not, who does, and what would change that or confirm it; strict refuses."""
    raw, hardware, options, reason, fix = FALLBACKS[name]
    (issue,) = (each for each in planned(raw, hardware, **options).issues if each.code == "attention_fallback")
    assert issue.level == "warning"
    assert issue.message.startswith("attention backend quick, of rank 10, ")
    assert issue.message.endswith(": torch, of rank 0, is taken")
    assert reason in issue.message
    assert fix in issue.fix
    assert issue.fix.endswith("set attention_backend to torch to say that this is enough")
    assert "attention_fallback" in [each.code for each in planned(raw, hardware, **options, strict=True).errors]
    confirmed = planned(raw, hardware, **options, attention_backend="torch")
    assert "attention_fallback" not in [each.code for each in confirmed.issues]


def test_a_backend_for_other_devices_is_no_fallback() -> None:
    """A CPU never hoped for a GPU's."""
    assert planned({}, cpu()).issues == ()


class Needy:
    """Brings a backend and an op that need packages."""

    def __init__(self, *requires: str) -> None:
        self.requires = requires

    @hookimpl
    def paddock_attention_backends(self) -> Any:
        """Return the backend."""
        (quick,) = MadePlugin().paddock_attention_backends()
        return [evolve(quick, name="needy", rank=20, requires=self.requires)]

    @hookimpl
    def paddock_ops(self) -> Any:
        """Return the op."""
        (op,) = MadePlugin().paddock_ops()
        return [evolve(op, implementation="needy:rms_norm", rank=20, requires=self.requires)]


def test_a_package_that_is_not_installed_keeps_a_backend_and_an_op_from_serving() -> None:
    """The plan says which is missing and how to get it, and takes the next; nothing is imported to find out."""
    plan = planned(plugins=[Needy("attrs", "tritno")])
    assert plan.attention.name == "quick"
    assert "needs the package tritno, which is not installed" in rejected(plan, "attention_backend")["needy"]
    assert "tritno" in rejected(plan, "op rms_norm")["needy:rms_norm"]
    (issue,) = plan.issues
    assert issue.fix.startswith("pip install tritno, or ")


def test_packages_that_are_installed_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that breaks when it is imported is not found out here; a folder of its name is not the package."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_when_imported.py").write_text("1 / 0")
    (tmp_path / "mere_folder").mkdir()
    plan = planned(plugins=[Needy("breaks_when_imported")])
    assert (plan.attention.name, plan.issues) == ("needy", ())
    assert planned(plugins=[Needy("mere_folder")]).attention.name == "quick"


def test_a_backend_that_was_asked_for_is_used() -> None:
    """Rank decides only among what nobody named."""
    plan = planned(attention_backend="torch")
    assert plan.attention.name == "torch"
    assert plan.choice("attention_backend").reason == "asked for"


def test_kv_follows_what_the_checkpoint_was_calibrated_for() -> None:
    """A calibrated checkpoint keeps FP8 KV where a backend can, whatever its rank."""
    assert planned(GROUPED).kv_cache_dtype == "fp8"
    assert planned(GROUPED).attention.name == "torch"
    assert planned(GROUPED, kv_cache_dtype="bfloat16").attention.name == "quick"
    assert planned().kv_cache_dtype == "bfloat16"


def test_uncalibrated_fp8_kv_is_worth_saying() -> None:
    """FP8 KV that was asked for without calibrated scales is a warning, an error where warnings are, and nothing for dummies."""
    asked: dict[str, Any] = {"kv_cache_dtype": "fp8", "attention_backend": "torch"}
    (issue,) = planned(**asked).issues
    assert (issue.level, issue.code) == ("warning", "kv_scales_are_one")
    assert "kv_scales_are_one" in [issue.code for issue in planned(**asked, strict=True).errors]
    assert not planned(**asked, load_format="dummy").issues


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"growth": 0.0812, "limit": 0.01}, "perplexity had grown by 8.12%, its gate allowed 1.00%"),
        ({"growth": None, "limit": 0.01}, "its gate was not passed"),
        ("nothing", "its gate was not passed"),
    ],
)
def test_a_folder_whose_gate_failed_is_worth_saying(gate: object, said: str) -> None:
    """A warning, an error where warnings are; nothing for dummies, nor where the gate was passed."""
    files = source(RAW, manifest={"status": "failed", "gate": gate})

    def issues(files: ModelSource, **options: Any) -> list[tuple[str, str]]:
        plan = resolve(EngineConfig(model="made", **options), registry(), gpus(), files)
        return [(issue.level, issue.message) for issue in plan.issues]

    message = f"paddock quantize marked the checkpoint failed: {said}"
    assert issues(files) == [("warning", message)]
    assert issues(files, strict=True) == [("error", message)]
    assert not issues(files, load_format="dummy")
    assert not issues(source(RAW, manifest={"status": "complete", "gate": gate}))


def test_ops_are_chosen_one_by_one() -> None:
    """The op of the highest rank that runs here wins; the plain definition fills in everywhere else."""
    quick = {spec.op: spec.implementation for spec in planned().ops}
    plain = {spec.op: spec.implementation for spec in planned({}, cpu()).ops}
    assert quick["rms_norm"].endswith("made:rms_norm")
    assert quick["gelu"] == plain["gelu"] == "paddock.layers.reference:gelu"
    assert plain["rms_norm"] == "paddock.layers.reference:rms_norm"


def test_an_op_is_taken_from_the_plugin_that_was_asked_for() -> None:
    """Option `ops` names the plugin, and rank no longer counts."""
    plan = planned(ops={"rms_norm": "paddock"})
    assert plan.choice("op rms_norm").value == "paddock.layers.reference:rms_norm"
    assert plan.choice("op rms_norm").reason == "asked for"


def test_all_gpus_are_used_by_tensor_parallelism_where_it_divides() -> None:
    """Given two GPUs and no sizes, two ranks share each layer."""
    plan = planned({}, gpus(2), plugins=[ParallelPlugin()])
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size) == (2, 1)
    assert [spec.axis for spec in plan.parallel] == ["tp"]


def test_pipeline_stages_take_over_where_heads_do_not_divide() -> None:
    """Three GPUs cannot share four heads: three stages can share four layers."""
    plan = planned({}, gpus(3), plugins=[ParallelPlugin()])
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size) == (1, 3)
    assert "cannot share them evenly" in rejected(plan, "parallel")["tp 3 x pp 1"]


def test_groups_that_straddle_ranks_are_rejected() -> None:
    """Two ranks take 32 inputs of o each, one group; four would take half a group each."""
    plan = planned(GROUPED, gpus(4), plugins=[ParallelPlugin()])
    assert plan.tensor_parallel_size == 2
    assert "0.5 groups of 32" in rejected(plan, "parallel")["tp 4 x pp 1"]


def test_both_strategies_are_named_outermost_first() -> None:
    """Two by two GPUs need both plugins' strategies, pipeline outside."""
    plan = planned({}, gpus(4), plugins=[ParallelPlugin()], tensor_parallel_size=2, pipeline_parallel_size=2)
    assert [spec.name for spec in plan.parallel] == ["pipeline", "tensor"]


def test_what_several_gpus_hold_alike_is_mentioned() -> None:
    """Four ranks hold each of two KV heads twice, in the weights and in the pages; two ranks hold one each."""
    (issue,) = planned({}, gpus(4), plugins=[ParallelPlugin()]).issues
    assert (issue.level, issue.code) == ("info", "held_alike")
    assert issue.message == "4 ranks share 2 KV heads, so that they hold 2 copies each of k, v, the KV pages"
    assert not planned({}, gpus(2), plugins=[ParallelPlugin()]).issues


def test_idle_gpus_are_mentioned() -> None:
    """Fewer ranks than GPUs is fine, and said."""
    plan = planned({}, gpus(4), plugins=[ParallelPlugin()], tensor_parallel_size=2)
    assert [issue.code for issue in plan.issues] == ["idle_devices"]
    assert not plan.errors


def test_the_batch_grows_with_the_sequences_and_they_shrink_with_it() -> None:
    """A step takes a token of every sequence: whichever of the two was given bounds the other."""
    assert planned(max_num_seqs=10_000).max_num_batched_tokens == 10_000
    assert planned(max_num_batched_tokens=64).max_num_seqs == 64
    assert (planned().max_num_batched_tokens, planned().max_num_seqs) == (8192, 256)


def test_the_length_is_the_models_unless_memory_is_short() -> None:
    """A pool too small for the model's own length shortens an automatic one, with a warning, and strict refuses."""
    long = {"positions": 1 << 20}
    assert planned().max_model_len == 256
    short = planned(long, kv_cache_memory_bytes=10 << 20)
    assert 512 <= short.max_model_len == short.kv_tokens < 1 << 20
    assert [issue.level for issue in short.issues] == ["warning"]
    assert planned(long, kv_cache_memory_bytes=10 << 20, strict=True).errors


def test_end_of_text_ids_come_from_generation_config_first() -> None:
    """generation_config.json overrides config.json."""
    files = source(RAW, generation_config={"eos_token_id": [3, 5]})
    assert resolve(EngineConfig(model="made"), registry(), gpus(), files).eos_token_ids == (3, 5)
    assert planned().eos_token_ids == (7,)


def test_observers_run_only_when_named() -> None:
    """An installed observer is idle until the plan names it."""
    assert planned().observers == ()
    assert [spec.name for spec in planned(observers=["watch"]).observers] == ["watch"]


def test_plugins_have_their_say() -> None:
    """What a plugin's check finds is in the plan's issues; strict makes its warnings errors."""
    assert [issue.message for issue in planned(plugins=[ComplainingPlugin()]).issues] == ["4 layers"]
    assert [issue.code for issue in planned(plugins=[ComplainingPlugin()], strict=True).errors] == ["made_up"]


def test_every_choice_has_a_reason() -> None:
    """No decision is left unexplained, nor a rejection."""
    for choice in planned(GROUPED, gpus(4)).choices:
        assert choice.reason
        assert all(each.reason for each in choice.rejected), choice.name
