"""GPTQ's checkpoints: unsigned 4-bit weights, eight inputs to a word, zero points stored as such or less one. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from paddock.errors import ModelConfigError
from paddock.plugins import CheckpointFacts
from paddock_quant_awq.autoround import accept_how_rounded
from paddock_quant_awq.names import Outside
from paddock_quant_awq.reading import Section, find
from paddock_quant_awq.scheme import GPTQ, Int4Scheme

OLD_FILE = "quantize_config.json"  # what AutoGPTQ wrote before it used config.json

# How weights were found and who may run them; a checkpoint's meaning does not depend on it.
# fmt: off
_HARMLESS = (
    "quant_method", "method", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path",
    "model_file_base_name", "dataset", "tokenizer", "batch_size", "pad_token_id", "disable_exllama", "use_exllama",
    "exllama_config", "max_input_length", "cache_block_outputs", "use_cuda_fp16", "model_seqlen", "block_name_to_quantize",
    "module_name_preceding_first_block", "meta", "backend", "mse", "act_group_aware", "uri", "version", "pack_impl",
)
# fmt: on


def detect(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of a GPTQ checkpoint, else None; raise ModelConfigError for what is GPTQ but not readable."""
    section = find(facts, "gptq", old_file=OLD_FILE, old_keys=frozenset({"bits", "group_size"}))
    if section is None:
        return None
    reader = section.reader
    offset = zero_offset(section)
    reader.only("bits", value=4)
    reader.only("pack_dtype", value="int32")
    section.refuse_unless_empty("adapter", "the checkpoint has an adapter beside its weights")
    group_size, reorders = section.group_size("group_size"), reader.flag("desc_act", default=False)
    reader.accept(*_HARMLESS)
    accept_how_rounded(section)
    scheme = Int4Scheme(
        name="gptq",
        dtype=facts.dtype,
        packing=GPTQ,
        group_size=group_size,
        symmetric=reader.flag("sym", default=False),
        zero_offset=offset,
        reorders=reorders and group_size != -1,
        signed_scales=True,
        is_plain=Outside(excluded=_excluded(section), inside=tuple(_inside(section))),
        quantises_head=reader.flag("lm_head", default=False),
    )
    reader.finish()
    return scheme


def zero_offset(section: Section) -> int:
    """Return what is to be added to stored zero points: 1 in the first version of the format, 0 in the second."""
    reader, entry = section.reader, section.entry
    reader.accept("checkpoint_format", "format", "is_marlin_format")
    found = str(entry.get("checkpoint_format") or entry.get("format") or "gptq")
    if entry.get("is_marlin_format"):
        found = "marlin"
    if found not in ("gptq", "gptq_v2"):
        raise ModelConfigError(
            f"the checkpoint is GPTQ in layout {found!r}; of GPTQ only the layouts 'gptq' and 'gptq_v2' are supported",
            fix="use a checkpoint whose checkpoint_format is gptq or gptq_v2",
        )
    return 1 if found == "gptq" else 0


def _excluded(section: Section) -> tuple[str, ...]:
    """Return the patterns of `dynamic` that leave modules plain; raise ModelConfigError for one that quantises them otherwise."""
    section.reader.accept("dynamic")
    dynamic = section.entry.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise section.reader.wrong("dynamic", dynamic, "an object of patterns, or null")
    for pattern, settings in dynamic.items():
        if not pattern.startswith("-:"):
            raise section.reader.wrong(
                "dynamic", {pattern: settings}, "patterns that begin with '-:' (left plain): all else is stored alike"
            )
    patterns = tuple(pattern.removeprefix("-:") for pattern in dynamic)
    section.check_patterns("dynamic", patterns)
    return patterns


def _inside(section: Section) -> Iterator[str]:
    """Yield the names of the linears that are quantised, none where all are: a list, or a list of lists."""
    key = "modules_in_block_to_quantize"
    section.reader.accept(key)
    listed = section.entry.get(key) or []
    if not isinstance(listed, list):
        raise section.reader.wrong(key, listed, "lists of module names, or null")
    for each in listed:
        for name in each if isinstance(each, list) else [each]:
            if not isinstance(name, str) or not name:
                raise section.reader.wrong(key, name, "lists of module names, or null")
            yield name
