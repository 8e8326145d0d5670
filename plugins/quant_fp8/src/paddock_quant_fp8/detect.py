"""Which FP8 checkpoints are read, of those that name their own tool: `fbgemm_fp8`, and `fp8` as AutoFP8 writes it. Free of torch.

`fbgemm_fp8`: one weight scale a row, activations scaled per token and clipped. `fp8`: one weight scale a linear or a block,
activations with a stored scale (static) or scaled at run time (dynamic). Scales multiply: real = stored * scale.
"""

from __future__ import annotations

from paddock.axes import FP8_STATIC, FP8_TOKEN
from paddock.model_config import ConfigReader
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.reading import Entry, block_size, entry_of, names_in
from paddock_quant_fp8.schemes import DEFAULT_ACTIVATION_BOUND, E4M3, RowwiseFp8, TensorwiseFp8

__all__ = ["DEFAULT_ACTIVATION_BOUND", "E4M3", "RowwiseFp8", "TensorwiseFp8", "detect_autofp8", "detect_fbgemm"]


def detect_fbgemm(facts: CheckpointFacts) -> RowwiseFp8 | None:
    """Return the scheme of a `fbgemm_fp8` checkpoint, else None; raise ModelConfigError for keys it must not hold."""
    found = entry_of(facts, lambda method: method == "fbgemm_fp8")
    if found is None:
        return None
    reader, entry = found
    scheme = RowwiseFp8(
        dtype=facts.dtype,
        activation_bound=reader.number("activation_scale_ub", default=DEFAULT_ACTIVATION_BOUND, low=1e-3),
        skipped=names_in(reader, entry, "modules_to_not_convert"),
    )
    reader.finish()
    return scheme


def detect_autofp8(facts: CheckpointFacts) -> TensorwiseFp8 | None:
    """Return the scheme of an `fp8` checkpoint, else None; raise ModelConfigError for unknown schemes and keys."""
    found = entry_of(facts, lambda method: method == "fp8")
    if found is None:
        return None
    reader, entry = found
    if not reader.has("activation_scheme"):
        raise reader.wrong(
            "activation_scheme", None, "'static' where the checkpoint holds the scales of inputs (input_scale), else 'dynamic'"
        )
    static = reader.choice("activation_scheme", allowed=("static", "dynamic")) == "static"
    reader.only("kv_cache_scheme", value="static")
    reader.only("fmt", value="e4m3")
    reader.only("scale_fmt", value="float")  # of blocks; the other is a power of two in one byte
    reader.only("modules_to_convert", value=[])
    reader.accept("dequantize", "expert_dtype")  # transformers' own: how it loads, and experts, of which there are none
    block = _block(reader, entry)
    if static and block is not None:
        raise reader.wrong(
            "activation_scheme", "static", "'dynamic' beside weight_block_size: no tool stores input scales of blocks"
        )
    scheme = TensorwiseFp8(
        dtype=facts.dtype,
        input_format=FP8_STATIC if static else FP8_TOKEN,
        skipped=names_in(reader, entry, "ignored_layers", "modules_to_not_convert"),
        kv_cache_dtype="fp8" if reader.has("kv_cache_scheme") else None,
        block=block,
    )
    reader.finish()
    return scheme


def _block(reader: ConfigReader, entry: Entry) -> tuple[int, int] | None:
    if not reader.has("weight_block_size"):
        return None
    return block_size(reader, "weight_block_size", entry["weight_block_size"])
