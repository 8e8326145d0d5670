"""AutoRound's checkpoints: its own rounding, in GPTQ's packing or in AutoAWQ's. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddock.plugins import CheckpointFacts
from paddock_quant_awq.names import OutsideBlocks
from paddock_quant_awq.reading import Section, find
from paddock_quant_awq.scheme import AWQ_GEMM, GPTQ, Int4Scheme

_METHODS = ("auto-round", "intel/auto-round")  # the latter in its first versions
_DEFAULT = "auto_round:auto_gptq"
# The packing, and what is added to stored zero points.
_PACKINGS = {
    _DEFAULT: (GPTQ, 1),
    "auto_round:gptq": (GPTQ, 1),
    "gptq": (GPTQ, 1),
    "auto_gptq": (GPTQ, 1),
    "auto": (GPTQ, 1),
    "auto_round:gptqmodel": (GPTQ, 0),
    "auto_round": (GPTQ, 0),
    "auto_round:auto_awq": (AWQ_GEMM, 0),
    "auto_round:awq": (AWQ_GEMM, 0),
    "auto_awq": (AWQ_GEMM, 0),
}
_KERNELS = ("exllamav1", "exllamav2", "triton", "tritonv2", "cuda", "qigen")  # older versions name one behind the packing
_BLOCK_KEYS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
_PLAIN_BITS = 16
_HEAD = "lm_head"

# How the rounding was found; a checkpoint's meaning does not depend on it.
# fmt: off
_HARMLESS = (
    "quant_method", "amp", "batch_size", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input",
    "gradient_accumulate_steps", "iters", "lr", "low_gpu_mem_usage", "minmax_lr", "nsamples", "scale_dtype", "seqlen", "dataset",
    "supported_types", "autoround_version", "backend", "enable_alg_ext", "static_kv_granularity",
    "static_attention_granularity", "act_group_size", "act_sym", "act_dynamic", "act_data_type", "quant_lm_head",
    "model_free", "provider", "train_bs", "n_samples",
)
_MORE = (
    "super_bits", "super_group_size", "static_kv_dtype", "static_attention_dtype", "rotation_config", "rotation_configs",
    "spinquant_config",
)
# fmt: on


def detect(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of an AutoRound checkpoint, else None; raise ModelConfigError for what is AutoRound but not readable."""
    section = find(facts, *_METHODS)
    if section is None:
        return None
    reader = section.reader
    packing, offset = _packing(section)
    reader.only("bits", value=4)
    reader.only("desc_act", value=False)
    accept_how_rounded(section)
    group_size, symmetric = section.group_size("group_size"), reader.flag("sym", default=True)
    excluded, quantised = _layers(section, {"bits": 4, "group_size": group_size, "sym": symmetric, "data_type": "int"})
    scheme = Int4Scheme(
        name="auto-round",
        dtype=facts.dtype,
        packing=packing,
        group_size=group_size,
        symmetric=symmetric and reader.has("sym") and packing == GPTQ,
        zero_offset=offset,
        signed_scales=True,
        is_plain=OutsideBlocks(_blocks(section), excluded, quantised),
        quantises_head=_HEAD in quantised,
    )
    reader.finish()
    return scheme


def accept_how_rounded(section: Section) -> None:
    """Let pass what AutoRound says of how it rounded, in any format it writes; raise ModelConfigError for anything beyond."""
    reader = section.reader
    reader.only("data_type", value="int")
    if (width := reader.integer("act_bits", default=_PLAIN_BITS)) < _PLAIN_BITS:
        raise reader.wrong("act_bits", width, "16 or more: activations stay as they are")
    for key in _MORE:
        section.refuse_unless_empty(key, "the checkpoint is more than weights, scales and zero points")
    reader.accept(*_HARMLESS, *_BLOCK_KEYS)


def _packing(section: Section) -> tuple[str, int]:
    """Return the packing, and what is added to stored zero points; older versions name both in `backend`, before a kernel."""
    section.reader.accept("packing_format")
    key = next((key for key in ("packing_format", "backend") if section.entry.get(key)), "packing_format")
    said = section.entry.get(key) or _DEFAULT
    layout, _, kernel = said.rpartition(":") if isinstance(said, str) else ("", "", "")
    found = _PACKINGS.get(layout if kernel in _KERNELS else str(said))
    if found is None:
        raise section.reader.wrong(key, said, f"one of {', '.join(map(repr, _PACKINGS))}, and perhaps a kernel's name after it")
    return found


def _layers(section: Section, common: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules that `extra_config` leaves plain, and those it quantises like all others.

    Raises ModelConfigError for one that it quantises otherwise.
    """
    section.reader.accept("extra_config")
    extra = section.entry.get("extra_config") or {}
    if not isinstance(extra, Mapping) or not all(isinstance(settings, Mapping) for settings in extra.values()):
        raise section.reader.wrong("extra_config", extra, "an object with an object for each module, or null")
    plain = tuple(name for name, settings in extra.items() if _is_plain(settings))
    section.check_patterns("extra_config", plain)
    for name, settings in extra.items():
        other = {key: value for key, value in settings.items() if value is not None and common.get(key, value) != value}
        if name not in plain and other:
            raise section.reader.wrong(
                "extra_config", {name: other}, "16 bits (left plain) or what all modules have: " + str(dict(common))
            )
    return plain, tuple(name for name in extra if name not in plain)


def _is_plain(settings: Mapping[str, Any]) -> bool:
    bits = settings.get("bits")
    return isinstance(bits, int) and bits >= _PLAIN_BITS


def _blocks(section: Section) -> tuple[str, ...]:
    """Return the modules whose linears are quantised: texts, lists of them, one text with commas, or none for all.

    Older versions call the key otherwise; the first that says something counts.
    """
    section.reader.accept(*_BLOCK_KEYS)
    key = next((key for key in _BLOCK_KEYS if section.entry.get(key)), _BLOCK_KEYS[0])
    listed = section.entry.get(key) or []
    if isinstance(listed, str):
        return tuple(name.strip() for name in listed.split(",") if name.strip())
    outer = listed if isinstance(listed, list) else [listed]
    names = [name for each in outer for name in (each if isinstance(each, list) else [each])]
    if not all(isinstance(name, str) and name for name in names):
        raise section.reader.wrong(key, listed, "module names: a text with commas, a list, a list of lists, or null")
    return tuple(names)
