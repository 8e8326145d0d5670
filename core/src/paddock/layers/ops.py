"""The named ops a model is made of, bound once when it is built: which implementation runs is decided by planning.

T tokens, V vocabulary, E, I model or input features, O output features, F feed-forward size, H query heads, K KV heads,
G = H / K query heads of a KV head, D head size, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from attrs import evolve, field, fields_dict, frozen
from torch import Tensor

from paddock.layers import reference
from paddock.layers.attention import LayerKV
from paddock.layers.int4 import Int4Weight
from paddock.layers.op_marks import adds_two_deltas, keeps_heads_apart, rotates_heads_apart
from paddock.layers.quantized import QuantizedActivation
from paddock.layers.unfused_fp8 import FUSED, unfused


class RopeAndCache(Protocol):
    """Rotate q and k to their positions and write k and v into their slots."""

    def __call__(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cos_sin_LD: Tensor,
        positions_T: Tensor,
        kv: LayerKV,
        slots_T: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> Tensor:
        """Return the rotated q [T, H, D], contiguous. The scales ([] float32, real = stored * scale) matter to FP8 pages only.

        Marked `HEADS_APART` it takes heads at any stride and q in groups [T, K, G, D] too; else heads come side by side.
        """


class CacheKV(Protocol):
    """Write k and v into their slots as they are."""

    def __call__(
        self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, slots_T: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
    ) -> None:
        """Return nothing; `kv` holds the tokens afterwards. Heads come side by side unless it is marked `HEADS_APART`."""


class NormFp8(Protocol):
    """Add, take the root-mean-square norm, quantise."""

    def __call__(
        self,
        x_TE: Tensor,
        delta_TE: Tensor | None,
        weight_E: Tensor,
        eps: float,
        scale: Tensor | None,
        bound: float | None,
        group: int | None = None,
    ) -> tuple[Tensor, QuantizedActivation]:
        """Return (x + delta, its norm in FP8): by the static `scale` [] or, where that is None, one a token (and group)."""


class AddLayerNorm(Protocol):
    """Add, take the layer norm."""

    def __call__(
        self,
        x_TE: Tensor,
        delta_TE: Tensor,
        weight_E: Tensor,
        bias_E: Tensor | None,
        eps: float,
        *,
        more_TE: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x + delta, its norm). Marked `TWO_DELTAS` it adds `more_TE` to the delta first; else it is not given any."""


class LayerNormFp8(Protocol):
    """Add, take the layer norm, quantise."""

    def __call__(
        self,
        x_TE: Tensor,
        delta_TE: Tensor | None,
        weight_E: Tensor,
        bias_E: Tensor | None,
        eps: float,
        scale: Tensor | None,
        bound: float | None,
        group: int | None = None,
        *,
        more_TE: Tensor | None = None,
    ) -> tuple[Tensor, QuantizedActivation]:
        """Return (x + delta, its norm in FP8): by the static `scale` [] or, where that is None, one a token (and group).

        Marked `TWO_DELTAS` it adds `more_TE` to the delta first; else it is not given any.
        """


class Fp8Of(Protocol):
    """Activate, quantise."""

    def __call__(
        self, x_TX: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None, /
    ) -> QuantizedActivation:
        """Return the activation in FP8: by the static `scale` [] or, where that is None, one a token (and group)."""


class QuantizeToken(Protocol):
    """Quantise by scales found at run time."""

    def __call__(self, x_TI: Tensor, bound: float | None = None, group: int | None = None, /) -> QuantizedActivation:
        """Return x in FP8 with a scale a token, or one a token and group of features."""


class LinearFp8Blocks(Protocol):
    """Multiply FP8 values whose scales are of blocks."""

    def __call__(
        self,
        values_TI: Tensor,
        scale_TG: Tensor,
        weight_OI: Tensor,
        weight_scale_QG: Tensor,
        block: tuple[int, int],
        dtype: torch.dtype,
        /,
    ) -> Tensor:
        """Return x W^T [T, O] in `dtype`; a weight's scale covers `block` (outputs, inputs), a token's as many inputs."""


class LinearSiluMulFp8(Protocol):
    """Multiply FP8 values, activate, quantise."""

    def __call__(
        self,
        values_TI: Tensor,
        x_scale: Tensor,
        weight_OI: Tensor,
        weight_scale_O1: Tensor,
        dtype: torch.dtype,
        scale: Tensor,
        /,
    ) -> QuantizedActivation:
        """Return silu(gate) * up in FP8 by the static `scale` [], for gate and up side by side in x W^T in `dtype`."""


@frozen(eq=False, kw_only=True)
class Ops:
    """One implementation of every op. `layers.reference` defines each of them, signature, rounding and all.

    embed(token_ids_T, table_VE) -> x_TE; linear(x_TI, weight_OI) -> y_TO;
    rms_norm(x_TE, weight_E, eps) -> h_TE; add_rms_norm(x_TE, delta_TE, weight_E, eps) -> (x + delta, its norm);
    layer_norm(x_TE, weight_E, bias_E or None, eps) -> h_TE; add_layer_norm likewise; silu_mul(gate_up_T2F) -> [T, F];
    gelu(x_TF) -> [T, F]; quantize_fp8_static(x_TI, scale); quantize_fp8_token(x_TI, bound or None, group or None);
    linear_fp8(values_TI, x_scale [] or [T, 1], weight_OI, weight_scale_O1, dtype) -> y_TO; linear_fp8_fast
    likewise, whose sums may keep fewer bits than float32; linear_fp8_blocks(values_TI, scale_TG, weight_OI, weight_scale_QG,
    block, dtype) -> y_TO; linear_int4(x_TI, weight) -> y_TO; linear_int4_fp8(values_TI, scale_T1,
    weight, dtype) -> y_TO; int4_to_fp8(weight, row_scale_O1) -> values_OI; `silu_mul_fp8`, `gelu_fp8`, `rms_norm_fp8` and
    `layer_norm_fp8` quantise what the plain op returns, by a static scale, one a token, or one a token and group;
    linear_silu_mul_fp8(values_TI, x_scale, weight_OI, weight_scale_O1, dtype, scale) is `linear_fp8` and then `silu_mul_fp8` by
    the static scale, linear_silu_mul_fp8_fast `linear_fp8_fast` and then that. What an implementation is not marked to take
    (`takes`) is done before it: heads are laid side by side, two deltas summed.
    """

    embed: Callable[[Tensor, Tensor], Tensor] = reference.embed
    linear: Callable[[Tensor, Tensor], Tensor] = reference.linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = reference.add_rms_norm
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = reference.layer_norm
    add_layer_norm: AddLayerNorm = field(default=reference.add_layer_norm, converter=adds_two_deltas)
    silu_mul: Callable[[Tensor], Tensor] = reference.silu_mul
    gelu: Callable[[Tensor], Tensor] = reference.gelu
    rope_and_cache: RopeAndCache = field(default=reference.rope_and_cache, converter=rotates_heads_apart)
    cache_kv: CacheKV = field(default=reference.cache_kv, converter=keeps_heads_apart)
    quantize_fp8_static: Callable[[Tensor, Tensor], QuantizedActivation] = reference.quantize_fp8_static
    quantize_fp8_token: QuantizeToken = reference.quantize_fp8_token
    linear_fp8: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor] = reference.linear_fp8
    linear_fp8_fast: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor] = reference.linear_fp8_fast
    linear_fp8_blocks: LinearFp8Blocks = reference.linear_fp8_blocks
    linear_int4: Callable[[Tensor, Int4Weight], Tensor] = reference.linear_int4
    linear_int4_fp8: Callable[[Tensor, Tensor, Int4Weight, torch.dtype], Tensor] = reference.linear_int4_fp8
    int4_to_fp8: Callable[[Int4Weight, Tensor], Tensor] = reference.int4_to_fp8
    rms_norm_fp8: NormFp8 = reference.rms_norm_fp8
    layer_norm_fp8: LayerNormFp8 = field(default=reference.layer_norm_fp8, converter=adds_two_deltas)
    silu_mul_fp8: Fp8Of = reference.silu_mul_fp8
    gelu_fp8: Fp8Of = reference.gelu_fp8
    linear_silu_mul_fp8: LinearSiluMulFp8 = reference.linear_silu_mul_fp8
    linear_silu_mul_fp8_fast: LinearSiluMulFp8 = reference.linear_silu_mul_fp8_fast

    @classmethod
    def bind(cls, implementations: Mapping[str, Any]) -> Ops:
        """Return the ops with these implementations by name; an op not named runs its reference.

        What nobody fuses, a producer of FP8 or a product that ends in one, runs the parts bound here, one after the other.
        """
        assert implementations.keys() <= OP_NAMES, implementations.keys() - OP_NAMES
        ops = cls(**implementations)
        for name, parts in FUSED.items():
            if ops._is_defined(name) and not all(map(ops._is_defined, parts)):
                ops = evolve(ops, **{name: unfused(name, ops)})
        return ops

    def with_fast_sums(self) -> Ops:
        """Return the same ops with the fast product in the place of the exact one, plain and ending in an activation."""
        return evolve(self, linear_fp8=self.linear_fp8_fast, linear_silu_mul_fp8=self.linear_silu_mul_fp8_fast)

    def _is_defined(self, name: str) -> bool:
        """Return whether an op runs its definition."""
        return getattr(self, name) is getattr(reference, name)


OP_NAMES = frozenset(fields_dict(Ops))
