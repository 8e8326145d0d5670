"""AutoAWQ's checkpoints: unsigned 4-bit weights and zero points, eight outputs to a word. Free of torch."""

from __future__ import annotations

from paddock.errors import ModelConfigError
from paddock.plugins import CheckpointFacts
from paddock_quant_awq.autoround import accept_how_rounded
from paddock_quant_awq.names import Containing
from paddock_quant_awq.reading import Section, find
from paddock_quant_awq.scheme import AWQ_GEMM, Int4Scheme

OLD_FILE = "quant_config.json"  # what AutoAWQ wrote before it used config.json

_GEMM = "gemm"
_LAYOUT_KEYS = ("version", "format", "checkpoint_format")  # AutoAWQ writes the first, GPTQModel all three

# What transformers, AutoAWQ and GPTQModel write beside the format and a checkpoint's meaning does not depend on.
# fmt: off
_HARMLESS = (
    "quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "tokenizer", "dataset",
    "damp_percent", "true_sequential", "use_cuda_fp16", "model_seqlen", "batch_size", "pad_token_id", "max_input_length", "sym",
    "cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize",
    "meta", "act_group_aware", "method", "pack_impl",
)
# fmt: on


def detect(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of an AutoAWQ checkpoint, else None; raise ModelConfigError for what is AWQ but not in gemm layout."""
    section = find(facts, "awq", old_file=OLD_FILE, old_keys=frozenset({"w_bit", "bits"}))
    if section is None:
        return None
    _refuse_other_layouts(section)
    section.reader.accept(*_HARMLESS)
    accept_how_rounded(section)
    # AutoRound, which chooses the sign of a scale, writes false where every zero point is 8; they are stored nonetheless.
    signed = not section.reader.flag("zero_point", default=True) or section.reader.has("autoround_version")
    scheme = Int4Scheme(
        name="awq",
        dtype=facts.dtype,
        packing=AWQ_GEMM,
        group_size=section.group_size("group_size", "q_group_size"),
        signed_scales=signed,
        is_plain=Containing(section.names("modules_to_not_convert")),
    )
    section.reader.finish()
    return scheme


def _refuse_other_layouts(section: Section) -> None:
    """Raise ModelConfigError unless the weights are 4-bit in the gemm layout."""
    entry, reader = section.entry, section.reader
    said = [str(entry[key]).lower() for key in _LAYOUT_KEYS if entry.get(key)]
    if entry.get("backend") == "llm-awq":
        said.insert(0, "llm-awq")
    version = next((layout for layout in said if layout != _GEMM), _GEMM)
    if version != _GEMM:
        raise ModelConfigError(
            f"the checkpoint is AWQ in layout {version!r}; of AWQ only layout 'gemm' is supported",
            fix="use a checkpoint in AutoAWQ's gemm layout, or quantise again with version='GEMM'",
        )
    reader.accept(*_LAYOUT_KEYS)
    reader.only("desc_act", value=False)
    reader.only("lm_head", value=False)
    reader.only("pack_dtype", value="int32")
    section.refuse_unless_empty("dynamic", "single layers are stored otherwise")
    reader.only("bits", "w_bit", value=4)
