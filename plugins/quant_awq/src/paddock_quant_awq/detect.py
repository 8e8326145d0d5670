"""Which AWQ checkpoints are read and what tensors hold each linear. Free of torch.

AutoAWQ's `gemm` version: unsigned 4-bit weights and zero points, eight to a word along the output, one scale a group of inputs;
real = (weight - zero point) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from paddock.axes import PLAIN, VOCAB, Linear, Tensor, TensorAxis, left_plain
from paddock.errors import ModelConfigError, PlanError
from paddock.model_config import ConfigReader
from paddock.plugins import CheckpointFacts

OLD_FILE = "quant_config.json"  # what AutoAWQ wrote before it used config.json
WORD = 8  # weights in a 32-bit word

# What transformers and AutoAWQ write beside the format and a checkpoint's meaning does not depend on.
_HARMLESS = (
    *("quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "tokenizer", "dataset"),
    *(
        "damp_percent",
        "true_sequential",
        "use_cuda_fp16",
        "model_seqlen",
        "batch_size",
        "pad_token_id",
        "max_input_length",
        "sym",
    ),
    *("cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
    *("meta", "act_group_aware", "sym"),
)


@frozen(kw_only=True)
class AwqGemm:
    """Checkpoints in AutoAWQ's gemm layout. `group_size` -1 is one group an input row; `skipped` names plain modules in part."""

    dtype: str
    group_size: int
    skipped: tuple[str, ...] = ()
    name: str = "awq"
    kv_cache_dtype: str | None = None
    input_format: str = PLAIN

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return packed weights, packed zero points and scales, or the plain weight of a skipped linear and of the head.

        Raises PlanError when a group or a word would not be whole.
        """
        if linear.out[0].axis == VOCAB or left_plain(path, linear, self._skips):
            return (Tensor("weight", self.dtype, (TensorAxis("out"), TensorAxis("in"))),)
        self._check(path, linear)
        groups, words = TensorAxis("in", group=self.group_size), TensorAxis("out", pack=WORD)
        return (
            Tensor("qweight", "int32", (TensorAxis("in"), words)),
            Tensor("qzeros", "int32", (groups, words)),
            Tensor("scales", "float16", (groups, TensorAxis("out"))),
        )

    def _skips(self, path: str) -> bool:
        return any(entry in path for entry in self.skipped)

    def _check(self, path: str, linear: Linear) -> None:
        if self.group_size > 0 and linear.in_size % self.group_size:
            raise PlanError(
                f"{path} has {linear.in_size} inputs, which AWQ groups of {self.group_size} do not divide",
                fix="use a checkpoint with a smaller group size, or fewer ranks",
            )
        for part in linear.out:
            if part.size % WORD:
                raise PlanError(
                    f"{path}: part {part.name!r} has {part.size} outputs, and AWQ packs them {WORD} to a word",
                    fix="leave this linear plain in the checkpoint, or use fewer ranks",
                )


def detect(facts: CheckpointFacts) -> AwqGemm | None:
    """Return the scheme of an AutoAWQ checkpoint, else None; raise ModelConfigError for what is AWQ but not in gemm layout."""
    reader, entry = _entry(facts)
    if reader is None:
        return None
    _refuse_other_layouts(reader, entry)
    group_size = reader.integer("group_size", "q_group_size", default=128, low=-1)
    if group_size == 0:
        raise reader.wrong("group_size", group_size, "-1 (one group) or positive")
    reader.accept(*_HARMLESS)
    scheme = AwqGemm(dtype=facts.dtype, group_size=group_size, skipped=_names(reader, entry, "modules_to_not_convert"))
    reader.finish()
    return scheme


def _entry(facts: CheckpointFacts) -> tuple[ConfigReader | None, Mapping[str, Any]]:
    """Return what describes the quantisation, with a reader of it when it is AWQ; config.json goes before the old file."""
    entry = facts.config.get("quantization_config")
    if isinstance(entry, Mapping):
        return (_reader("quantization_config", entry), entry) if entry.get("quant_method") == "awq" else (None, {})
    old = facts.files.get(OLD_FILE)
    if old is None or "compression_config" in facts.config or not {"w_bit", "bits"} & old.keys():
        return None, {}
    return _reader(OLD_FILE, old), old


def _reader(name: str, entry: Mapping[str, Any]) -> ConfigReader:
    reader = ConfigReader({name: entry}).section(name)
    assert reader is not None
    return reader


def _refuse_other_layouts(reader: ConfigReader, entry: Mapping[str, Any]) -> None:
    """Raise ModelConfigError unless the weights are 4-bit with zero points in the gemm layout."""
    version = str(entry.get("version") or entry.get("format") or "gemm").lower()
    if entry.get("backend") == "llm-awq":
        version = "llm-awq"
    if version != "gemm":
        raise ModelConfigError(
            f"the checkpoint is AWQ in layout {version!r}; of AWQ only layout 'gemm' is supported",
            fix="use a checkpoint in AutoAWQ's gemm layout, or quantise again with version='GEMM'",
        )
    reader.accept("version", "format")
    reader.only("desc_act", value=False)
    reader.only("bits", "w_bit", value=4)
    if not reader.flag("zero_point", default=True):
        raise reader.wrong("zero_point", False, "true: no gemm checkpoint without zero points is known")


def _names(reader: ConfigReader, entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the module names listed under `key`; absent and null list none."""
    reader.accept(key)
    listed = entry.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
        raise reader.wrong(key, listed, "a list of module names, or null")
    return tuple(listed)
