"""Which FP8 checkpoints are read and what tensors hold each linear. Free of torch.

`fbgemm_fp8`: one weight scale a row, activations scaled per token and clipped. `fp8` (AutoFP8): one weight scale a linear,
activations with a stored scale (static) or scaled at run time (dynamic). Scales multiply: real = stored * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from paddock.axes import FP8_STATIC, FP8_TOKEN, VOCAB, Linear, Tensor, TensorAxis, left_plain
from paddock.errors import ModelConfigError
from paddock.model_config import ConfigReader
from paddock.plugins import CheckpointFacts

E4M3 = "float8_e4m3fn"
DEFAULT_ACTIVATION_BOUND = 1200.0  # transformers' FbgemmFp8Config

_OUT, _IN, _ONE = TensorAxis("out"), TensorAxis("in"), TensorAxis("in", group=-1)
_WEIGHT, _PER_PART = Tensor("weight", E4M3, (_OUT, _IN)), Tensor("weight_scale", "float32")


@frozen(kw_only=True)
class RowwiseFp8:
    """Checkpoints with `fbgemm_fp8`. Activations beyond `activation_bound` are clipped; `skipped` names plain modules."""

    dtype: str
    activation_bound: float = DEFAULT_ACTIVATION_BOUND
    skipped: tuple[str, ...] = ()
    name: str = "fbgemm_fp8"
    kv_cache_dtype: str | None = None
    input_format: str = FP8_TOKEN

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return an FP8 weight with a scale a row, or the plain weight of a skipped linear and of the head."""
        if linear.out[0].axis == VOCAB or left_plain(path, linear, self._skips):
            return (_plain(self.dtype),)
        return (_WEIGHT, Tensor("weight_scale", "float32", (_OUT, _ONE)))

    def _skips(self, path: str) -> bool:
        """Return whether an entry is this path, its last name, or a module around it."""
        leaf = path.rpartition(".")[2]
        return any(entry in (path, leaf) or f"{entry}." in path for entry in self.skipped)


@frozen(kw_only=True)
class TensorwiseFp8:
    """Checkpoints with `fp8` as AutoFP8 writes them. `input_format` says static or dynamic; `skipped` names plain modules."""

    dtype: str
    input_format: str
    skipped: tuple[str, ...] = ()
    name: str = "fp8"
    kv_cache_dtype: str | None = None

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return an FP8 weight with scalars for each part, or the plain weight of a skipped linear and of the head."""
        if linear.out[0].axis == VOCAB or left_plain(path, linear, self._skips):
            return (_plain(self.dtype),)
        static = (Tensor("input_scale", "float32"),) if self.input_format == FP8_STATIC else ()
        return (_WEIGHT, _PER_PART, *static)

    def _skips(self, path: str) -> bool:
        """Return whether an entry is this path or a module around it."""
        return any(path == entry or path.startswith(f"{entry}.") for entry in self.skipped)


def detect_fbgemm(facts: CheckpointFacts) -> RowwiseFp8 | None:
    """Return the scheme of a `fbgemm_fp8` checkpoint, else None; raise ModelConfigError for keys it must not hold."""
    reader, entry = _entry(facts, "fbgemm_fp8")
    if reader is None:
        return None
    scheme = RowwiseFp8(
        dtype=facts.dtype,
        activation_bound=reader.number("activation_scale_ub", default=DEFAULT_ACTIVATION_BOUND, low=1e-3),
        skipped=_names(reader, entry, "modules_to_not_convert"),
    )
    reader.finish()
    return scheme


def detect_autofp8(facts: CheckpointFacts) -> TensorwiseFp8 | None:
    """Return the scheme of an `fp8` checkpoint, else None; raise ModelConfigError for block scales and unknown keys."""
    reader, entry = _entry(facts, "fp8")
    if reader is None:
        return None
    if reader.has("weight_block_size"):
        raise ModelConfigError(
            f"the checkpoint has one FP8 scale a block of {entry['weight_block_size']} weights, which is not supported",
            fix="use a checkpoint with one scale a tensor (AutoFP8) or a row (fbgemm_fp8)",
        )
    static = reader.choice("activation_scheme", allowed=("static", "dynamic")) == "static"
    reader.only("kv_cache_scheme", value="static")
    reader.only("fmt", value="e4m3")
    scheme = TensorwiseFp8(
        dtype=facts.dtype,
        input_format=FP8_STATIC if static else FP8_TOKEN,
        skipped=_names(reader, entry, "ignored_layers", "modules_to_not_convert"),
        kv_cache_dtype="fp8" if reader.has("kv_cache_scheme") else None,
    )
    reader.finish()
    return scheme


def _entry(facts: CheckpointFacts, method: str) -> tuple[ConfigReader | None, Mapping[str, Any]]:
    """Return the quantisation section of config.json, with a reader of it when it is written by `method`."""
    entry = facts.config.get("quantization_config")
    if not isinstance(entry, Mapping) or entry.get("quant_method") != method:
        return None, {}
    reader = ConfigReader(facts.config).section("quantization_config")
    assert reader is not None
    reader.accept("quant_method")
    return reader, entry


def _names(reader: ConfigReader, entry: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """Return the module names listed under any of `keys`; absent and null list none."""
    reader.accept(*keys)
    names: list[str] = []
    for key in keys:
        listed = entry.get(key) or []
        if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
            raise reader.wrong(key, listed, "a list of module names, or null")
        names += listed
    return tuple(names)


def _plain(dtype: str) -> Tensor:
    return Tensor("weight", dtype, (_OUT, _IN))
