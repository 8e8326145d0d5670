"""How an FP8 product of few tokens (`linear_ring`) ends in silu(gate) * up in FP8, rounded where `silu_mul_fp8` rounds.

A tile's 64 rows are eight gates, the eight ups that go with them, and so on, so that gate meets up in a thread. The copy engine
brings them so: it sees a weight, gate before up, as eights of features x gate or up x 8 x inputs.

R rows of a tile, 64; N tokens of a tile; H features of a tile, 32; E eights of features, G gate or up.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from paddock_triton.linear_ring_spec import EIGHT, RingTile
from paddock_triton.ops_activation import silu_times
from paddock_triton.ring import ROWS

_ABOVE = gl.constexpr(456.0)  # rounds to 448
_APART = gl.constexpr(EIGHT)


@gluon.jit
def _to_fp8(x: gl.tensor, scale: gl.tensor) -> gl.tensor:
    """Return x / scale in FP8 e4m3, saturated, by the steps of `fp8.quotient`, whose zeros have no layout here."""
    zeros = gl.zeros_like(x)
    inverse = zeros + gl.div_rn(1.0, scale)
    x = tl.clamp(x, zeros - scale * _ABOVE, zeros + scale * _ABOVE, propagate_nan=tl.PropagateNan.ALL)
    guess = x * inverse
    return gl.fma(gl.fma(-guess, zeros + scale, x), inverse, guess).to(gl.float8e4nv)


@gluon.jit
def row_of(row_R: gl.tensor, features: gl.tensor) -> gl.tensor:
    """Return which rows of the weight lie where the copy engine puts them, counted over all tiles."""
    return row_R // _APART % 2 * features + row_R // (2 * _APART) * _APART + row_R % _APART


@gluon.jit
def store_gated(
    acc_RN: gl.tensor, outs: gl.tuple, tile: gl.tensor, half: gl.constexpr, cut: gl.constexpr, sizes: gl.tuple,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write a tile's features; the second of `outs` is their scale, and there is but one half and one cut."""
    tokens, outputs, _blocks, _span, _tiles, token_tiles = sizes
    columns: gl.constexpr = spec.columns
    features = outputs // 2
    sum_EGAN = acc_RN.reshape([4, 2, _APART, columns])
    gate_EAN, up_EAN = gl.split(sum_EGAN.permute([0, 2, 3, 1]))
    h_EAN = silu_times(gate_EAN.to(spec.gated).to(gl.float32), up_EAN.to(spec.gated).to(gl.float32), spec.gated)
    value_HN = _to_fp8(h_EAN.to(gl.float32), gl.load(outs[1])).reshape([ROWS // 2, columns])
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])
    token_N = tile % token_tiles * columns + gl.arange(0, columns, gl.SliceLayout(0, layout))
    first = (tile // token_tiles * spec.rows + half * ROWS) // 2
    feature_H = first + gl.arange(0, ROWS // 2, gl.SliceLayout(1, layout))
    at_HN = outs[0] + token_N.to(gl.int64)[None, :] * features + feature_H[:, None]
    inside_HN = (token_N < tokens)[None, :] & (feature_H < features)[:, None]
    gl.store(at_HN, gl.convert_layout(value_HN, layout), mask=inside_HN)


def described_gated(weight_OI: Tensor, tile: RingTile) -> TensorDescriptor:
    """Return a weight, gate before up, as the copy engine sees it [E, G, 8, I]."""
    (outputs, inputs), line = weight_OI.shape, weight_OI.stride(0)
    assert outputs % (2 * EIGHT) == 0, f"{outputs} rows are not eights of gates and as many of ups"
    shape, strides = [outputs // (2 * EIGHT), 2, EIGHT, inputs], [EIGHT * line, outputs // 2 * line, line, 1]
    return TensorDescriptor(weight_OI, shape, strides, [tile.rows // (2 * EIGHT), 2, EIGHT, tile.inputs], tile.in_eights)
