"""Plain checkpoints that become FP8 while they are read: a scale a row, activations scaled per token. Free of torch."""

from __future__ import annotations

from attrs import frozen

from paddock.axes import FP8_TOKEN, Linear, Tensor
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.schemes import ROW, Stored, is_head, tensors_of


@frozen(kw_only=True)
class OnlineFp8:
    """A plain checkpoint whose linears, all but the head, are kept in FP8."""

    dtype: str
    name: str = "fp8"
    kv_cache_dtype: str | None = None

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return a scale a row; None for the head."""
        return None if is_head(linear) else Stored(scales=ROW, input_format=FP8_TOKEN)

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the tensors that are kept; the checkpoint has one plain weight."""
        return tensors_of(self.stored(path, linear), self.dtype)


def scheme(facts: CheckpointFacts) -> OnlineFp8:
    """Return the scheme of a plain checkpoint that is to be kept in FP8."""
    return OnlineFp8(dtype=facts.dtype)
