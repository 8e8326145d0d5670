"""Which AutoRound checkpoints are recognised, what each layer's own settings do, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from plugins.quant_awq.tests.made import found, linear, scheme_of

from paddock.errors import ModelConfigError
from paddock_quant_awq.scheme import AWQ_GEMM, GPTQ

ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("auto_round:auto_gptq", (GPTQ, 1)),
        ("auto_round:gptqmodel", (GPTQ, 0)),
        ("auto_round", (GPTQ, 0)),
        ("auto_round:auto_awq", (AWQ_GEMM, 0)),
        ("auto_round:gptq", (GPTQ, 1)),
        ("auto_round:awq", (AWQ_GEMM, 0)),
        ("auto", (GPTQ, 1)),
    ],
)
def test_the_packing_is_gptqs_or_autoawqs(packing: str, expected: tuple[str, int]) -> None:
    """And what is stored of a zero point goes with it."""
    scheme = scheme_of(ROUND | {"packing_format": packing})
    assert (scheme.packing, scheme.zero_offset) == expected
    assert "qweight" in [tensor.name for tensor in scheme.tensors("down", linear(96, 256))]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("auto_round:gptq:exllamav2", (GPTQ, 1)),
        ("gptq:exllamav2", (GPTQ, 1)),
        ("auto_round:exllamav2", (GPTQ, 0)),
        ("auto_round:triton", (GPTQ, 0)),
        ("auto", (GPTQ, 1)),
    ],
)
def test_older_versions_name_the_packing_in_backend(backend: str, expected: tuple[str, int]) -> None:
    """Before a kernel, under the method's older name; beside packing_format it is a wish for a kernel and says nothing."""
    older = {key: value for key, value in ROUND.items() if key != "packing_format"} | {"quant_method": "intel/auto-round"}
    scheme = scheme_of(older | {"backend": backend, "scale_dtype": "torch.float16", "train_bs": 8, "n_samples": 512})
    assert (scheme.name, scheme.packing, scheme.zero_offset) == ("auto-round", *expected)
    assert scheme_of(ROUND | {"backend": backend}).zero_offset == 1
    with pytest.raises(ModelConfigError, match="backend is 'auto_round:bitblas'"):
        found(older | {"backend": "auto_round:bitblas"})


@pytest.mark.parametrize("written_as", ["awq", "gptq"])
def test_what_it_writes_in_other_formats_is_read(written_as: str) -> None:
    """With how it rounded beside the format's own keys; what would change the checkpoint's meaning is refused there too."""
    entry = {**ROUND, "quant_method": written_as, "iters": 200, "autoround_version": "0.5.1", "data_type": "int", "amp": True}
    entry |= {
        "to_quant_block_names": None,
        "provider": "auto-round",
        "enable_quanted_input": True,
        "scale_dtype": "torch.float16",
    }
    entry |= {"zero_point": False, "version": "gemm"} if written_as == "awq" else {"desc_act": False}
    del entry["packing_format"]
    scheme = scheme_of(entry)
    assert (scheme.name, scheme.signed_scales) == (written_as, True)
    with pytest.raises(ModelConfigError, match="act_bits is 8"):
        found(entry | {"act_bits": 8})


def test_a_published_configuration_is_read() -> None:
    """What the tool writes of how it found the rounding passes."""
    keys = {"iters": 200, "nsamples": 512, "seqlen": 2048, "lr": 0.005, "autoround_version": "0.5.1", "data_type": "int"}
    keys |= {"batch_size": 8, "enable_quanted_input": True, "low_gpu_mem_usage": True, "block_name_to_quantize": "model.layers"}
    keys |= {"model_free": True, "desc_act": False, "provider": "auto-round"}
    scheme = scheme_of(ROUND | keys)
    assert not scheme.is_plain("model.layers.3.mlp.down_proj")
    assert scheme.is_plain("vision.layers.3.mlp.down_proj")


@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names", "quant_block_list"])
@pytest.mark.parametrize("blocks", ["model.layers, encoder", ["model.layers", "encoder"], [["model.layers"], ["encoder"]]])
def test_blocks_are_named_in_any_form(key: str, blocks: Any) -> None:
    """One text, a list, a list of lists, under what the tool called the key at the time."""
    scheme = scheme_of(ROUND | {key: blocks})
    assert not scheme.is_plain("encoder.3.mlp")
    assert not scheme.is_plain("model.layers.3.mlp.down_proj")
    assert scheme.is_plain("vision.3.mlp")


def test_layers_with_16_bits_are_plain_and_others_must_be_alike() -> None:
    """`extra_config` names modules or patterns; the head is quantised where it is named with the common settings."""
    extra: dict[str, Any] = {"model.layers.0.mlp.down_proj": {"bits": 16}, ".*o_proj.*": {"bits": 16, "data_type": "fp"}}
    scheme = scheme_of(ROUND | {"extra_config": extra})
    assert scheme.is_plain("model.layers.0.mlp.down_proj")
    assert scheme.is_plain("model.layers.5.self_attn.o_proj")
    assert not any(scheme.is_plain(path) for path in ("model.layers.1.mlp.down_proj", "x.model.layers.0.mlp.down_proj"))
    assert not scheme.quantises_head
    head = scheme_of(ROUND | {"extra_config": {"lm_head": {"bits": 4, "group_size": 128, "sym": True}}})
    assert head.quantises_head
    assert not head.is_plain("lm_head")


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"bits": 2}, "bits is 2"),
        ({"data_type": "mx_fp"}, "data_type"),
        ({"act_bits": 8}, "act_bits is 8"),
        ({"packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
        ({"extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}}}, "down_proj"),
        ({"extra_config": {"model.layers.0.mlp.down_proj": {"group_size": 32}}}, "group_size"),
        ({"extra_config": {"(": {"bits": 16}}}, "extra_config"),
        ({"extra_config": ["x"]}, "extra_config"),
        ({"super_bits": 6}, "super_bits"),
        ({"rotation_config": {"kind": "hadamard"}}, "rotation_config"),
        ({"spinquant_config": {"r1": True}}, "spinquant_config"),
        ({"desc_act": True}, "desc_act is True"),
        ({"packing_format": ["auto_round"]}, "packing_format"),
        ({"to_quant_block_names": {"a": 1}}, "to_quant_block_names"),
        ({"quant_block_list": [[1]]}, "quant_block_list"),
        ({"novelty": 1}, "novelty"),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], named: str) -> None:
    """Settings of single layers, rounded activations and unknown keys are errors, never guesses."""
    with pytest.raises(ModelConfigError, match=named) as error:
        found(ROUND | entry)
    assert error.value.fix
