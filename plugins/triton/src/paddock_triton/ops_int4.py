"""A 4-bit weight in another form.

O outputs, I inputs, K inputs of a block of 128; the bytes are those of `paddock.layers.int4`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock.layers.int4 import Int4Weight
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import to_fp8
from paddock_triton.launch import launch
from paddock_triton.rows import blocks_of

_ROWS = 64  # of a program
_BLOCK = tl.constexpr(128)
_SLAB = tl.constexpr(16)
_SLAB_BYTES = tl.constexpr(1024)


@named("int4_to_fp8")
def int4_to_fp8(weight: Int4Weight, row_scale_O1: Tensor) -> Tensor:
    """Return a 4-bit weight as FP8 e4m3 [O, I], each output divided by its scale: real = values * row_scale, and a rounding."""
    form = weight.form
    values_OI = torch.empty(form.outputs, form.inputs, dtype=torch.float8_e4m3fn, device=weight.packed.device)
    launch(
        _fp8_kernel, (form.blocks, blocks_of(form.outputs, _ROWS)),
        weight.packed, weight.scales, weight.scales if weight.zeros is None else weight.zeros, row_scale_O1.contiguous(),
        values_OI, form.inputs, form.outputs, form.filled_outputs, GROUP=form.group, ZEROS=weight.zeros is not None,
        BLOCK_O=_ROWS, num_warps=4, **DEPENDENT,
    )  # fmt: skip
    return values_OI


@triton.jit(do_not_specialize=["inputs", "outputs", "filled"])
def _fp8_kernel(
    packed_ptr: tl.tensor, scales_ptr: tl.tensor, zeros_ptr: tl.tensor, row_scale_ptr: tl.tensor, values_ptr: tl.tensor,
    inputs: tl.tensor, outputs: tl.tensor, filled: tl.tensor, GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK_O: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of inputs of some outputs; the weight is nobody's to write, the values may be a reader's before."""
    start_next()
    block, o_O, k_K = tl.program_id(0), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, _BLOCK)
    first_O1 = ((block * (filled // _SLAB) + o_O // _SLAB).to(tl.int64) * _SLAB_BYTES + o_O % 8 * 64)[:, None]
    in_slab_K = k_K // 64 * 512 + k_K // 4 % 4 * 16 + k_K // 32 % 2 * 8 + k_K // 16 % 2 * 4 + k_K % 4
    byte_OK = tl.load(packed_ptr + first_O1 + in_slab_K[None, :]).to(tl.int32)
    number_OK = (byte_OK >> (o_O // 8 % 2 * 4)[:, None]) & 15
    group_1K = ((block * _BLOCK + k_K) // GROUP)[None, :].to(tl.int64)
    if ZEROS:
        pair_O1 = (o_O // _SLAB * 8 + o_O % 8)[:, None]
        zero_OK = tl.load(zeros_ptr + group_1K * (filled // 2) + pair_O1).to(tl.int32)
        number_OK -= (zero_OK >> (o_O // 8 % 2 * 4)[:, None]) & 15
    else:
        number_OK -= 8
    scale_OK = tl.load(scales_ptr + group_1K * filled + o_O[:, None]).to(tl.float32)
    wait()
    inside_O1 = (o_O < outputs)[:, None]
    row_O1 = tl.load(row_scale_ptr + o_O[:, None], mask=inside_O1, other=1.0)
    value_OK = to_fp8(number_OK.to(tl.float32) * scale_OK, row_O1)
    input_1K = (block * _BLOCK + k_K)[None, :]
    at_OK = values_ptr + o_O.to(tl.int64)[:, None] * inputs + input_1K
    tl.store(at_OK, value_OK, mask=inside_O1 & (input_1K < inputs))
