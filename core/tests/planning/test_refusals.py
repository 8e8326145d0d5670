"""What cannot be planned is refused with the value that is wrong and the way out; what cannot run is an error in the plan."""

from __future__ import annotations

import re
from typing import Any

import pytest
from attrs import evolve
from core.tests.planning.made import RAW, MadePlugin, ParallelPlugin, cpu, gpus, planned, registry, source

from paddock.config import EngineConfig
from paddock.errors import ModelConfigError, OptionError, PaddockError, PlanError, PluginError
from paddock.planning.issues import require_runnable
from paddock.planning.resolve import resolve
from paddock.plugins import QuantizationSpec, hookimpl

GROUPED = {"quantization_config": {"quant_method": "grouped"}}
# Options that leave next to nothing but weights and KV.
LEAN: dict[str, Any] = {"attention_backend": "torch", "max_num_seqs": 1, "max_num_batched_tokens": 16}


class SecondFormat:
    """Another plugin that recognises the same checkpoints."""

    @hookimpl
    def paddock_quantizations(self) -> Any:
        """Return the same format under another name."""
        (spec,) = MadePlugin().paddock_quantizations()
        return [evolve(spec, name="second")]


class Torn:
    """A format whose detection finds the checkpoint unreadable."""

    @hookimpl
    def paddock_quantizations(self) -> Any:
        """Return a format that recognises nothing."""
        return [QuantizationSpec(name="awq", detect="core.tests.planning.test_refusals:detect_nothing", method="a:b")]


def detect_nothing(facts: Any) -> None:
    """Return None."""


@pytest.mark.parametrize("found", [None, [], "MadeForCausalLM", [1]])
def test_a_config_without_architectures_is_refused(found: Any) -> None:
    """The key must be a list of names."""
    with pytest.raises(ModelConfigError, match="no architectures"):
        planned({"architectures": found})


def test_an_unknown_architecture_says_what_is_installed_and_what_to_install() -> None:
    """A first-party architecture names its distribution, another one what is there."""
    with pytest.raises(PluginError, match="builtin") as caught:
        planned({"architectures": ["LlamaForCausalLM"]})
    assert "paddock-llama" in caught.value.fix
    with pytest.raises(PluginError, match="MadForCausalLM") as caught:
        planned({"architectures": ["MadForCausalLM"]})
    assert "MadeForCausalLM" in caught.value.fix


REFUSED = [
    ({}, {"attention_backend": "quik"}, PluginError, "quik"),
    ({}, {"attention_backend": "quick", "block_size": 48}, PlanError, "pages of 64, 32 tokens, not 48"),
    ({}, {"attention_backend": "quick", "kv_cache_dtype": "fp8"}, PlanError, "not in fp8"),
    ({"features": ["sinks"]}, {}, PlanError, "lacks sinks"),
    ({}, {"block_size": 7}, PlanError, "not 7"),
    ({}, {"max_model_len": 257}, PlanError, "257.* 256"),
    ({}, {"max_num_seqs": 64, "max_num_batched_tokens": 32}, PlanError, "32 .*64"),
    ({}, {"tensor_parallel_size": 3}, PlanError, "3 ranks cannot share"),
    ({}, {"tensor_parallel_size": 1, "pipeline_parallel_size": 5}, PlanError, "5 stages for 4 layers"),
    ({}, {"ops": {"rms_norn": "paddock"}}, OptionError, "rms_norn"),
    ({}, {"ops": {"rms_norm": "nobody"}}, OptionError, "nobody"),
    ({}, {"observers": ["wach"]}, PluginError, "wach"),
    ({}, {"quantization": "grouped"}, PlanError, "not quantised"),
    ({}, {"quantization": "groupd"}, PluginError, "groupd"),
    (GROUPED, {"quantization": "none"}, PlanError, "is quantised"),
    (GROUPED, {"dtype": "float32"}, PlanError, "not float32"),
    ({"quantization_config": {"quant_method": "nvfp4"}}, {}, PluginError, "nvfp4"),
    ({"quantization_config": {"bits": 4}}, {"quantization": "none"}, PlanError, "is quantised"),
]


@pytest.mark.parametrize(("raw", "options", "kind", "says"), REFUSED)
def test_what_cannot_be_decided_is_refused(raw: dict[str, Any], options: dict[str, Any], kind: Any, says: str) -> None:
    """Each wrong option or unsupported combination raises its own kind of error, quoting the value, with a way out."""
    with pytest.raises(kind, match=says) as caught:
        planned(raw, gpus(), **options)
    assert caught.value.fix


ASKED_IN_VAIN: dict[str, tuple[dict[str, Any], Any, dict[str, Any], str, str]] = {
    "old GPU": (
        {},
        gpus(capability=(8, 0)),
        {},
        "needs compute capability 9.0, Made GPU has 8.0",
        "use a GPU of compute capability 9.0 or later, or leave attention_backend at auto: torch can serve",
    ),
    "a CPU": ({}, cpu(), {}, "runs on cuda, not on cpu", "auto: torch can serve"),
    "dtype": (
        {},
        gpus(),
        {"dtype": "float32"},
        "takes bfloat16, float16, not float32",
        "set dtype to bfloat16 or float16; set kv_cache_dtype to bfloat16 or float16, or leave attention_backend at auto",
    ),
    "feature": ({"features": ["alibi"]}, gpus(), {}, "lacks alibi", "leave attention_backend at auto: torch can serve"),
    "nothing serves": ({"features": ["sinks"]}, gpus(), {}, "lacks sinks", "paddock list attention"),
}


@pytest.mark.parametrize("name", ASKED_IN_VAIN)
def test_a_backend_asked_for_that_cannot_serve_is_refused_with_what_would_do(name: str) -> None:
    """It is never replaced: the error has its reasons, what would let it serve, and who serves without."""
    raw, hardware, options, says, fix = ASKED_IN_VAIN[name]
    with pytest.raises(PlanError) as caught:
        planned(raw, hardware, attention_backend="quick", **options)
    assert caught.value.message.startswith("attention_backend is 'quick', which cannot serve this: ")
    assert says in caught.value.message
    assert fix in caught.value.fix


def test_an_op_asked_for_that_cannot_serve_is_refused_with_what_would_do() -> None:
    """The plugin's op needs a GPU; the fix is one, or no wish."""
    with pytest.raises(PlanError, match="runs on cuda, not on cpu") as caught:
        planned({}, cpu(), ops={"rms_norm": "MadePlugin"})
    assert caught.value.fix == "run on cuda, or leave rms_norm out of ops"


def test_a_format_two_plugins_recognise_names_both() -> None:
    """Nothing decides between two formats but the user, who is told how."""
    with pytest.raises(PluginError, match=r"'grouped' of .* and 'second' of ") as caught:
        planned(GROUPED, plugins=[SecondFormat()])
    assert "quantization=" in caught.value.fix
    chosen = planned(GROUPED, plugins=[SecondFormat()], quantization="second").quantization
    assert chosen is not None
    assert chosen.name == "second"


def test_a_declared_format_that_its_plugin_does_not_recognise_is_refused() -> None:
    """Config.json says awq, the plugin that brings it disagrees: an error, not a plain load."""
    with pytest.raises(PlanError, match="no installed quantisation recognises"):
        planned({"quantization_config": {"quant_method": "awq"}}, plugins=[Torn()])


@pytest.mark.parametrize("name", ["bitsandbytes", "hqq", "gguf", "llm-awq", "marlin"])
def test_a_format_of_another_tool_is_refused_by_name(name: str) -> None:
    """What no first-party plugin reads is no spelling mistake: the way out is another checkpoint."""
    with pytest.raises(PluginError, match=f"no plugin brings .* '{name}'") as caught:
        planned({"quantization_config": {"quant_method": name, "bits": 4}}, plugins=[Torn()])
    assert caught.value.fix == "use the plain model it was made from, or one in a format that is read: awq, grouped"


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("quantization_config", "awq"),
        ("quantization_config", [1]),
        ("quantization_config", {"bits": 4, "group_size": 128}),
        ("compression_config", "pack-quantized"),
    ],
)
def test_an_entry_that_names_no_method_is_refused(key: str, entry: Any) -> None:
    """It is not taken for a plain checkpoint's: the error has what is there."""
    with pytest.raises(ModelConfigError, match="names no quant_method") as caught:
        planned({key: entry})
    assert f"{key} is {entry!r}" in caught.value.message
    assert f"{key}.quant_method" in caught.value.fix


def test_bitsandbytes_is_known_by_what_it_loads_in() -> None:
    """Its older checkpoints name no method."""
    with pytest.raises(PluginError, match="no plugin brings quantization 'bitsandbytes'"):
        planned({"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 6.0}})


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantisation_file_beside_a_plain_config_counts(name: str) -> None:
    """A checkpoint may say in a file of its own that it is quantised."""
    files = source(RAW, quantization_files={name: {"bits": 4}})
    with pytest.raises(PaddockError, match="no plugin brings quantization"):
        resolve(EngineConfig(model="made"), registry(), gpus(), files)


def codes(plan: Any) -> Any:
    """Return the codes of a plan's errors."""
    return [issue.code for issue in plan.errors]


def test_gpus_that_nothing_can_use_together_are_an_error_with_a_ledger() -> None:
    """Without a parallel plugin the plan still counts each GPU's bytes, and says what to install."""
    plan = planned({}, gpus(2))
    assert codes(plan) == ["no_tp_plugin"]
    assert "paddock-parallel" in plan.errors[0].fix
    assert plan.ledger.weights.layers < planned().ledger.weights.layers
    assert plan.kv_tokens > 0


def test_more_ranks_than_gpus_is_an_error() -> None:
    """Both numbers are said."""
    plan = planned({}, gpus(), plugins=[ParallelPlugin()], tensor_parallel_size=2)
    assert codes(plan) == ["too_few_devices"]
    assert "2 devices, there are 1" in plan.errors[0].message


class OnePairPlugin:
    """Brings tensor parallelism over two ranks at most."""

    @hookimpl
    def paddock_parallel_strategies(self) -> Any:
        """Return the strategy."""
        tensor, _ = ParallelPlugin().paddock_parallel_strategies()
        return [evolve(tensor, max_size=2)]


def test_a_strategy_has_its_limit() -> None:
    """More ranks than a strategy takes is an error, as many as it takes is none."""
    assert codes(planned({}, gpus(4), plugins=[OnePairPlugin()], tensor_parallel_size=4)) == ["tp_too_large"]
    assert codes(planned({}, gpus(2), plugins=[OnePairPlugin()], tensor_parallel_size=2)) == []


class SecondStrategy:
    """Brings tensor parallelism under another name."""

    @hookimpl
    def paddock_parallel_strategies(self) -> Any:
        """Return the strategy."""
        tensor, _ = ParallelPlugin().paddock_parallel_strategies()
        return [evolve(tensor, name="other")]


def test_two_strategies_for_one_axis_are_not_chosen_between() -> None:
    """Both are named."""
    with pytest.raises(PlanError, match=r"'tensor' of .*'other' of |'other' of .*'tensor' of "):
        planned({}, gpus(2), plugins=[ParallelPlugin(), SecondStrategy()])


def test_too_little_memory_says_how_much_and_what_would_do() -> None:
    """The message has the missing bytes, the fix more GPUs or fewer tokens."""
    plan = planned({"layers": 1200}, gpus(8, gib=0.1), plugins=[ParallelPlugin()], tensor_parallel_size=1, **LEAN)
    assert codes(plan) == ["out_of_memory"]
    assert plan.ledger.missing_bytes == plan.ledger.needed_bytes - plan.ledger.budget_bytes > 0
    assert "too little" in plan.errors[0].message
    assert "GPUs" in plan.errors[0].fix


def test_an_automatic_length_is_not_why_something_does_not_fit() -> None:
    """What is missing is the least that would do: weights, workspace and the shortest sequence, not the model's longest."""
    plan = planned({"layers": 1500, "positions": 1 << 24}, gpus(gib=0.1), **LEAN)
    assert plan.max_model_len == 512
    assert plan.ledger.missing_bytes == plan.ledger.fixed_bytes + 512 * plan.kv_bytes_per_token - plan.ledger.budget_bytes
    assert codes(plan) == ["out_of_memory"]


def test_more_gpus_are_advised_with_the_sequences_they_hold() -> None:
    """As many GPUs as the fix says do run it, with sequences as long as it says where the model takes longer ones."""
    raw = {"layers": 1200, "positions": 1 << 24}
    plan = planned(raw, gpus(gib=0.1), plugins=[ParallelPlugin()], **LEAN)
    advice = re.search(r"use (\d) GPUs \(tp (\d) x pp (\d), sequences to (\d+) tokens\)", plan.errors[0].fix)
    assert advice
    count, tensor, pipeline, length = map(int, advice.groups())
    sizes: dict[str, Any] = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    followed = planned(raw, gpus(count, gib=0.1), plugins=[ParallelPlugin()], **sizes, **LEAN)
    assert codes(followed) == []
    assert followed.max_model_len == length


def test_a_larger_share_of_the_memory_is_advised_where_it_would_do() -> None:
    """A model that misses by less than what is left aside is told the share with which it runs."""
    hardware = gpus(gib=0.1)
    plan = next(p for n in range(1000, 1500, 5) if codes(p := planned({"layers": n}, hardware, **LEAN)))
    (share,) = map(float, re.findall(r"raise gpu_memory_utilization to (0\.\d+)", plan.errors[0].fix))
    assert codes(planned(plan.model_config, hardware, gpu_memory_utilization=share, **LEAN)) == []


def test_half_the_bits_are_advised_where_they_would_do() -> None:
    """A CPU that prefers float32 but has no room for it is told that bfloat16 fits, and it does."""
    raw = {"layers": 1200}
    plan = planned(raw, cpu(gib=0.2), **LEAN)
    assert plan.dtype == "float32"
    assert "use dtype bfloat16" in plan.errors[0].fix
    assert codes(planned(raw, cpu(gib=0.2), dtype="bfloat16", **LEAN)) == []


def test_weights_that_would_fit_in_fewer_bits_say_so() -> None:
    """A plain checkpoint that misses by the size of its linears is pointed to a quantised one."""
    assert codes(planned({"layers": 1000}, gpus(gib=0.1), **LEAN)) == []
    plan = planned({"layers": 1800}, gpus(gib=0.1), **LEAN)
    assert codes(plan) == ["out_of_memory"]
    assert "INT4 checkpoint" in plan.errors[0].fix


def test_a_length_that_does_not_fit_says_which_does() -> None:
    """The fix names the longest sequence the pool holds."""
    plan = planned({"positions": 1 << 24}, gpus(gib=4), max_model_len=1 << 24)
    assert codes(plan) == ["out_of_memory"]
    assert f"lower max_model_len to {plan.kv_tokens}" in plan.errors[0].fix
    again = planned({"positions": 1 << 24}, gpus(gib=4), max_model_len=plan.kv_tokens)
    assert codes(again) == []


@pytest.mark.parametrize("hardware", [gpus(), cpu()], ids=["gpu", "cpu"])
@pytest.mark.parametrize("asked", [1, 30_000])
def test_a_pool_too_small_for_one_sequence_is_an_error(hardware: Any, asked: Any) -> None:
    """The fix names the bytes that suffice, and they do."""
    plan = planned({}, hardware, kv_cache_memory_bytes=asked)
    assert codes(plan) == ["pool_too_small"]
    needed = plan.ledger.pages_per_sequence * plan.ledger.page_bytes
    assert str(needed) in plan.errors[0].fix
    assert codes(planned({}, hardware, kv_cache_memory_bytes=needed)) == []


def test_a_pool_larger_than_memory_is_an_error() -> None:
    """An asked pool is never cut down in silence."""
    assert codes(planned({}, gpus(gib=4), kv_cache_memory_bytes=5 << 30)) == ["kv_cache_too_large"]


def test_errors_are_raised_together() -> None:
    """One error says everything that keeps a plan from running."""
    plan = planned({}, gpus(2, gib=0.01), max_model_len=256)
    assert codes(plan) == ["no_tp_plugin", "out_of_memory"]
    with pytest.raises(PlanError) as caught:
        require_runnable(plan)
    assert "too little" in caught.value.message
    assert "tensor_parallel_size" in caught.value.message
    require_runnable(planned())
