"""Prefill attention for Hopper's asynchronous matrix unit, in Gluon. Every other case is `attention_prefill`'s.

A program holds 128 rows, two groups of 64, and walks keys 128 at a time, which may be pieces of several pages. While a group's
product with V runs it takes the softmax of the next tile, and the groups take turns, so that one multiplies while the other does
not. FP8 pages pass through four more warps, which turn them into float16. Rows and units are those of `attention_prefill`; what
the warps do is in `attention_roles`.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock_triton.attention_roles import KEYS, RAW_SLOTS, ROWS, SLOTS, attend, converter, copier, pipe
from paddock_triton.attention_schedule import UNIT, Units
from paddock_triton.attention_tile import LOG2E
from paddock_triton.dependence import DEPENDENT
from paddock_triton.failures import OTHER_ATTENTION, named
from paddock_triton.launch import launch
from paddock_triton.ring import barriers

UNIT_ROWS = 2 * ROWS.value


@frozen(kw_only=True)
class AsyncSpec:
    """All that the kernel is compiled for. `scale2` makes products base-2 logits but for the scale of FP8 keys."""

    head: int
    group: int
    num_kv_heads: int
    page: int
    fp8: bool
    scale2: float

    @classmethod
    def of(cls, q_THD: Tensor, kv: LayerKV, params: AttentionParams) -> AsyncSpec:
        """Return what to compile for these tensors."""
        _, page, num_kv_heads, head = kv.k_pages_NPKD.shape
        assert params.scale > 0, params.scale  # the running maximum is taken before scaling
        return cls(
            head=head,
            group=q_THD.shape[1] // num_kv_heads,
            num_kv_heads=num_kv_heads,
            page=page,
            fp8=kv.k_pages_NPKD.dtype == FP8,
            scale2=params.scale * LOG2E,
        )

    @property
    def heads(self) -> int:
        """Return H."""
        return self.group * self.num_kv_heads

    @property
    def box(self) -> int:
        """Return how many keys of a page are copied at once."""
        return min(self.page, int(KEYS.value))

    @property
    def layout(self) -> gl.NVMMASharedLayout:
        """Return how tiles that are multiplied lie in shared memory."""
        return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    @property
    def page_layout(self) -> gl.NVMMASharedLayout:
        """Return how tiles lie there as they come from pages."""
        return gl.NVMMASharedLayout(swizzle_byte_width=self.head, element_bitwidth=8, rank=2) if self.fp8 else self.layout

    def described(self, pages_NPKD: Tensor) -> TensorDescriptor:
        """Return pages as the copy engine sees them."""
        num_pages, page, heads, head = pages_NPKD.shape
        rows, width = num_pages * page, heads * head
        return TensorDescriptor(pages_NPKD, [rows, width], [width, 1], [self.box, head], self.page_layout)


def runs_on(device: torch.device) -> bool:
    """Return whether a device has the matrix unit: compute capability 9, whose successors have another one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def serves(q_THD: Tensor, kv: LayerKV, params: AttentionParams) -> bool:
    """Return whether the kernel is for these types and this head size, and knows what is asked for beside.

    It computes heads of 64 too, but there a tile is half the work: 0.73 to 0.9 of the other's speed up to 2k tokens, 1.06 at 8k.
    """
    _, page, _, head = kv.k_pages_NPKD.shape
    plain = not params.in_fp8 and params.alibi_slopes_H is None and params.window is None and params.softcap is None
    whole = (page >= 16 and KEYS.value % page == 0) or page % KEYS.value == 0  # a tile is made of whole boxes
    return plain and whole and head == 128 and kv.k_pages_NPKD.dtype in (q_THD.dtype, FP8)


@named("prefill", fix=OTHER_ATTENTION)
def prefill_async(
    out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, units: Units, params: AttentionParams
) -> None:
    """Write the attention of the prefills, whose tokens follow the decodes', into `out_THD`; units hold `UNIT_ROWS` rows."""
    spec = AsyncSpec.of(q_THD, kv, params)
    launch(
        _prefill_async,
        (spec.num_kv_heads * units.count,),
        out_THD,
        q_THD,
        spec.described(kv.k_pages_NPKD),
        spec.described(kv.v_pages_NPKD),
        inputs.block_tables_SM,
        units.units_U8,
        inputs.query_start_S1,
        params.k_scale,
        params.v_scale,
        inputs.block_tables_SM.stride(0),
        spec=spec,
        num_warps=4,
        **DEPENDENT,
    )


@gluon.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables_ptr", "starts_ptr"])
def _prefill_async(
    out_ptr: gl.tensor, q_ptr: gl.tensor, k_pages: tma.tensor_descriptor, v_pages: tma.tensor_descriptor, tables_ptr: gl.tensor,
    units_ptr: gl.tensor, starts_ptr: gl.tensor, k_scale_ptr: gl.tensor, v_scale_ptr: gl.tensor, table_stride: gl.tensor,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    gdc_launch_dependents()
    kv_head, unit_ptr = gl.program_id(0) % spec.num_kv_heads, units_ptr + gl.program_id(0) // spec.num_kv_heads * UNIT
    gdc_wait()
    seq = gl.load(unit_ptr)
    if seq >= 0:
        first_row, stop_row, length = gl.load(unit_ptr + 1), gl.load(unit_ptr + 2), gl.load(unit_ptr + 5)
        start = gl.load(starts_ptr + seq)
        context = length - (gl.load(starts_ptr + seq + 1) - start)  # tokens before this step's
        tiles = gl.cdiv(context + (stop_row - 1) // spec.group + 1, KEYS)
        place = (start, context, length, first_row, stop_row, kv_head, tiles)
        table_ptr = tables_ptr + seq.to(gl.int64) * table_stride
        dtype: gl.constexpr = gl.float16 if spec.fp8 else q_ptr.dtype.element_ty
        q_2MD = gl.allocate_shared_memory(dtype, [2, ROWS, spec.head], spec.layout)
        keys, values = pipe(dtype, SLOTS, 2, spec), pipe(dtype, SLOTS, 2, spec)
        turns = barriers(2, 1)
        if spec.fp8:
            scales = (gl.load(k_scale_ptr) * spec.scale2, gl.load(v_scale_ptr))
            raw = pipe(k_pages.dtype, RAW_SLOTS, 1, spec)
            gl.warp_specialize(
                [
                    (attend, (out_ptr, q_ptr, q_2MD, keys, values, turns, place, scales, 0, spec)),
                    (attend, (out_ptr, q_ptr, q_2MD, keys, values, turns, place, scales, 1, spec)),
                    (converter, (place, raw, keys, values, spec)),
                    (copier, (k_pages, v_pages, table_ptr, place, raw, values, spec)),
                ],
                [4, 4, 1],
                [208, 72, 24],
            )
        else:
            scales = (spec.scale2, 1.0)
            gl.warp_specialize(
                [
                    (attend, (out_ptr, q_ptr, q_2MD, keys, values, turns, place, scales, 0, spec)),
                    (attend, (out_ptr, q_ptr, q_2MD, keys, values, turns, place, scales, 1, spec)),
                    (copier, (k_pages, v_pages, table_ptr, place, keys, values, spec)),
                ],
                [4, 1],
                [240, 24],
            )
