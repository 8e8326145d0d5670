"""The named ops a model is made of, bound once when it is built: which implementation runs is decided by planning.

T tokens, V vocabulary, E, I model or input features, O output features, F feed-forward size, H query heads, K KV heads,
D head size, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from attrs import fields_dict, frozen
from torch import Tensor

from paddock.layers import reference
from paddock.layers.attention import LayerKV
from paddock.layers.quantized import QuantizedActivation


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
        """Return the rotated q [T, H, D]. The scales ([] float32, real = stored * scale) matter to FP8 pages only."""


class CacheKV(Protocol):
    """Write k and v into their slots as they are."""

    def __call__(
        self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, slots_T: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
    ) -> None:
        """Return nothing; `kv` holds the tokens afterwards."""


@frozen(eq=False, kw_only=True)
class Ops:
    """One implementation of every op. `layers.reference` defines each of them, signature, rounding and all.

    embed(token_ids_T, table_VE) -> x_TE; linear(x_TI, weight_OI) -> y_TO;
    rms_norm(x_TE, weight_E, eps) -> h_TE; add_rms_norm(x_TE, delta_TE, weight_E, eps) -> (x + delta, its norm);
    layer_norm(x_TE, weight_E, bias_E or None, eps) -> h_TE; add_layer_norm likewise; silu_mul(gate_up_T2F) -> [T, F];
    gelu(x_TF) -> [T, F]; quantize_fp8_static(x_TI, scale); quantize_fp8_token(x_TI, bound or None).
    """

    embed: Callable[[Tensor, Tensor], Tensor] = reference.embed
    linear: Callable[[Tensor, Tensor], Tensor] = reference.linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = reference.add_rms_norm
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = reference.layer_norm
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]] = reference.add_layer_norm
    silu_mul: Callable[[Tensor], Tensor] = reference.silu_mul
    gelu: Callable[[Tensor], Tensor] = reference.gelu
    rope_and_cache: RopeAndCache = reference.rope_and_cache
    cache_kv: CacheKV = reference.cache_kv
    quantize_fp8_static: Callable[[Tensor, Tensor], QuantizedActivation] = reference.quantize_fp8_static
    quantize_fp8_token: Callable[[Tensor, float | None], QuantizedActivation] = reference.quantize_fp8_token

    @classmethod
    def bind(cls, implementations: Mapping[str, Any]) -> Ops:
        """Return the ops with these implementations by name; an op not named runs its reference."""
        assert implementations.keys() <= OP_NAMES, implementations.keys() - OP_NAMES
        return cls(**implementations)


OP_NAMES = frozenset(fields_dict(Ops))
