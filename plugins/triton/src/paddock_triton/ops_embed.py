"""Rows of the embedding table.

T tokens, V vocabulary, E model size; B elements of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.launch import launch
from paddock_triton.rows import blocks_of, unit_stride

_BLOCK, _WARPS = 1024, 4


@triton.jit
def _embed_kernel(
    ids_ptr: tl.tensor, table_ptr: tl.tensor, out_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Copy a block of one row."""
    start_next()
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    token, column_B = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    wait()
    row_ptr = table_ptr + tl.load(ids_ptr + token) * stride
    x_B = tl.load(row_ptr + column_B, mask=column_B < WIDTH, other=0.0)
    tl.store(out_ptr + token * WIDTH + column_B, x_B, mask=column_B < WIDTH)


@named("embed")
def embed(token_ids_T: Tensor, table_VE: Tensor) -> Tensor:
    """Return the rows of the table [T, E] for token ids (int64)."""
    table_VE, ids_T = unit_stride(table_VE), token_ids_T.contiguous()
    tokens, width = ids_T.shape[0], table_VE.shape[1]
    out_TE = table_VE.new_empty(tokens, width)
    if tokens:
        grid = (tokens * blocks_of(width, _BLOCK),)
        launch(
            _embed_kernel, grid,
            ids_T, table_VE, out_TE, table_VE.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=_WARPS, **DEPENDENT
        )  # fmt: skip
    return out_TE
