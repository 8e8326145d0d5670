"""The one form in which every 4-bit weight lies in memory: what formats load into and kernels read, in the matrix unit's order.

real = (code - zero) * scale with codes and zeros 0..15, one scale and zero for each group of inputs; without zeros each is 8.
Inputs are cut in blocks of 128, outputs in slabs of 16 and filled up to a multiple of 64; what fills up has code, zero, scale 0.
A block's slab is 1024 bytes, 16 for each lane of a warp: [chunk c: 2][lane: 32][byte: 16], lane = 4 r + t with r = 0..7 and
t = 0..3, byte = 8 v + 4 h + i with v, h = 0..1 and i = 0..3. The byte holds input 32 (2 c + v) + 16 h + 4 t + i of the block: in
its low nibble that of output r of the slab, in its high one that of output r + 8. Four neighbouring bytes are thus, after one
mask or one shift and mask, a register of the 8-bit operand of `wgmma` m64n*k32. docs/decisions/0067-the-seam-of-int4-products.md.

I inputs, O outputs, F outputs filled up to a multiple of 64, B = ceil(I / 128) blocks, S = F / 16 slabs, N = 1024 bytes,
K inputs filled up to a multiple of 128, G = ceil(K / group) rows of groups, P = F / 2 pairs, D = I / group groups of Q inputs,
R rows (outputs) of a piece. Bytes are moved in words of four neighbouring inputs: X = 2 nibbles, Y = 8 (r), C = V = H = 2, T = 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as nnf

BLOCK = 128  # inputs
SLAB = 16  # outputs
SLAB_BYTES = BLOCK * SLAB // 2
OUTPUTS = 64  # outputs come in multiples of it: the matrix unit's longer side
# Bytes of weights held in float32 at a time. A CPU keeps the smaller piece in its cache: 2048 x 4096 weights times one token took
# 8 to 16 ms in pieces of 4 MiB and 84 to 140 in pieces of 64, on one core; a GPU wants few launches.
PIECE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
MOST = 15  # of a code, and of a zero
FP8_MAX = 448.0  # the largest e4m3
MIDDLE = 8  # the zero of every group where none are kept
_LOW = 0x0F0F0F0F  # the low nibbles of a word


@frozen(kw_only=True)
class Int4Form:
    """The sizes of one weight: `inputs` I, `outputs` O, `group` inputs to a scale; `group` divides I."""

    inputs: int
    outputs: int
    group: int

    @property
    def blocks(self) -> int:
        """Return B."""
        return math.ceil(self.inputs / BLOCK)

    @property
    def filled_outputs(self) -> int:
        """Return F."""
        return math.ceil(self.outputs / OUTPUTS) * OUTPUTS

    @property
    def slabs(self) -> int:
        """Return S."""
        return self.filled_outputs // SLAB

    @property
    def groups(self) -> int:
        """Return how many groups the inputs have."""
        return self.inputs // self.group

    @property
    def group_rows(self) -> int:
        """Return G: rows past the inputs' groups belong to inputs that only fill up the last block, and hold scales of 0."""
        return math.ceil(self.blocks * BLOCK / self.group)


@frozen(kw_only=True, eq=False)
class Int4Weight:
    """A weight in its final form: `packed` uint8 [B, S, N], `scales` [G, F], `zeros` uint8 [G, P] or None where each is 8."""

    form: Int4Form
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def pieces(self) -> Iterator[slice]:
        """Yield slices of the outputs whose weights are small enough to hold in float32; each begins with a slab."""
        return pieces(self.form, self.packed.device)

    def numbers(self, rows: slice) -> Tensor:
        """Return code - zero of the outputs of a piece [R, D, Q] in float32: whole numbers."""
        assert rows.start % SLAB == 0, rows
        codes_FK = unpack(self.packed[:, rows.start // SLAB : math.ceil(rows.stop / SLAB)])
        codes_RI = codes_FK[: rows.stop - rows.start, : self.form.inputs]
        codes_RDQ = codes_RI.reshape(-1, self.form.groups, self.form.group).float()
        if self.zeros is None:
            return codes_RDQ - MIDDLE
        zeros_DR = unpack_zeros(self.zeros[: self.form.groups])[:, rows]
        return codes_RDQ - zeros_DR.T.unsqueeze(-1)

    def group_scales(self, rows: slice) -> Tensor:
        """Return the scales of some outputs [R, D] in float32."""
        return self.scales[: self.form.groups, rows].T.float()

    def row_scales(self) -> Tensor:
        """Return what each output is divided by to be FP8 [O, 1], float32: of the largest that its groups' numbers can be."""
        form = self.form
        scales_DO = self.scales[: form.groups, : form.outputs].float().abs()
        if self.zeros is None:
            reach_DO = scales_DO * MIDDLE
        else:
            zeros_DO = unpack_zeros(self.zeros[: form.groups])[:, : form.outputs]
            reach_DO = scales_DO * torch.maximum(zeros_DO, MOST - zeros_DO)
        reach_O1 = reach_DO.amax(0).unsqueeze(1)
        return torch.where(reach_O1 > 0, reach_O1, torch.ones_like(reach_O1)) / FP8_MAX

    def dequantise(self, rows: slice) -> Tensor:
        """Return the weight of the outputs of a piece [R, I] in float32."""
        return (self.numbers(rows) * self.group_scales(rows).unsqueeze(-1)).flatten(1)


def int4_weight(codes_OI: Tensor, scales_GO: Tensor, zeros_GO: Tensor | None = None) -> Int4Weight:
    """Return the weight of codes 0..15 (uint8), the scales of its groups and their zeros 0..15 (uint8), None for 8 each.

    As many groups as `scales_GO` has rows, all of one size.
    """
    outputs, inputs = codes_OI.shape
    assert inputs % len(scales_GO) == 0, (inputs, len(scales_GO))
    form = Int4Form(inputs=inputs, outputs=outputs, group=inputs // len(scales_GO))
    zeros = None if zeros_GO is None else pack_zeros(fill_groups(zeros_GO, form))
    return Int4Weight(form=form, packed=pack(codes_OI), scales=fill_groups(scales_GO, form), zeros=zeros)


def pieces(form: Int4Form, device: torch.device) -> Iterator[slice]:
    """Yield slices of the outputs whose weights are small enough to hold in float32; each begins at a multiple of 64."""
    step = max(OUTPUTS, PIECE_BYTES[device.type] // (4 * form.inputs) // OUTPUTS * OUTPUTS)
    for start in range(0, form.outputs, step):
        yield slice(start, min(start + step, form.outputs))


def pack(codes_OI: Tensor) -> Tensor:
    """Return codes 0..15 (uint8) as bytes [B, S, N]; outputs and inputs that only fill up have code 0."""
    outputs, inputs = codes_OI.shape
    filled_FK = nnf.pad(codes_OI, (0, -inputs % BLOCK, 0, -outputs % OUTPUTS)).contiguous()
    slabs, blocks = len(filled_FK) // SLAB, filled_FK.shape[1] // BLOCK
    low_SYBCVHT, high_SYBCVHT = filled_FK.view(torch.int32).view(slabs, 2, 8, blocks, 2, 2, 2, 4).unbind(1)
    words_BSCYTVH = (low_SYBCVHT | (high_SYBCVHT << 4)).permute(2, 0, 3, 1, 6, 4, 5).contiguous()
    return words_BSCYTVH.view(torch.uint8).view(blocks, slabs, SLAB_BYTES)


def unpack(packed_BSN: Tensor) -> Tensor:
    """Return the codes [F, K] (uint8), of some slabs as of all; those that only fill up are 0."""
    blocks, slabs, _ = packed_BSN.shape
    words_BSCYTVH = packed_BSN.view(torch.int32).unflatten(2, (2, 8, 4, 2, 2))  # type: ignore[no-untyped-call]
    words_SYBCVHT = words_BSCYTVH.permute(1, 3, 0, 2, 5, 6, 4)
    words_SXYBCVHT = torch.stack((words_SYBCVHT & _LOW, words_SYBCVHT >> 4 & _LOW), dim=1)
    return words_SXYBCVHT.view(slabs * SLAB, blocks * BLOCK // 4).view(torch.uint8)


def pack_zeros(zeros_GF: Tensor) -> Tensor:
    """Return zeros 0..15 (uint8) as bytes [G, P], eight a slab: outputs r and r + 8 are a pair, the former in the low nibble."""
    low_GSY, high_GSY = zeros_GF.reshape(len(zeros_GF), -1, 2, SLAB // 2).unbind(2)
    return (low_GSY | (high_GSY << 4)).flatten(1)


def unpack_zeros(packed_GP: Tensor) -> Tensor:
    """Return the zeros [G, F] (uint8)."""
    bytes_GSY = packed_GP.reshape(len(packed_GP), -1, SLAB // 2)
    return torch.stack((bytes_GSY & 15, bytes_GSY >> 4), dim=2).flatten(1)


def fill_groups(rows_GO: Tensor, form: Int4Form) -> Tensor:
    """Return scales or zeros of the inputs' groups [G, F], 0 for the outputs and the groups that only fill up.

    Outputs lie side by side, however they lay: a copy that pads nothing would keep the strides of what it copies.
    """
    filled_GF = rows_GO.new_zeros(form.group_rows, form.filled_outputs)
    filled_GF[: len(rows_GO), : form.outputs] = rows_GO
    return filled_GF
