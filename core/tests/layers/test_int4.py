"""4-bit weights: packing loses nothing, bytes are where kernels are told they are, products are those of the meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paddock.layers import int4, reference
from paddock.layers.int4 import Int4Form, Int4Weight, fill_groups, int4_weight, pack, pack_zeros, unpack, unpack_zeros
from paddock.testing.oracle import UNIT_ROUNDOFF, assert_close, bound, relative_rms

WHOLE = -1


def codes(rows: int, columns: int, seed: int) -> Tensor:
    """Return random codes 0..15."""
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def made(outs: int, ins: int, group: int, *, zeros: bool, dtype: torch.dtype = torch.float32) -> tuple[Int4Weight, Tensor]:
    """Return a random weight and what it means [O, I] in float64; group -1 is all inputs."""
    size = ins if group == WHOLE else group
    codes_OI, zeros_GO = codes(outs, ins, 1), codes(ins // size, outs, 2)
    scales_GO = (torch.rand(ins // size, outs, generator=torch.Generator().manual_seed(3)) + 0.5).to(dtype) * 0.01
    zeros_OI = zeros_GO.T.repeat_interleave(size, dim=1).double() if zeros else 8.0
    meaning_OI = (codes_OI.double() - zeros_OI) * scales_GO.T.repeat_interleave(size, dim=1).double()
    return int4_weight(codes_OI, scales_GO, zeros_GO if zeros else None), meaning_OI


def by_the_letter(codes_OI: Tensor) -> Tensor:
    """Return the bytes [B, S, 1024], each put in its place by itself."""
    outputs, inputs = codes_OI.shape
    rows, blocks = -(-outputs // 64) * 64, -(-inputs // 128)

    def code(o: int, k: int) -> int:
        return int(codes_OI[o, k]) if o < outputs and k < inputs else 0

    packed_BSN = torch.zeros(blocks, rows // 16, 1024, dtype=torch.uint8)
    for b in range(blocks):
        for s in range(rows // 16):
            for c in range(2):
                for lane in range(32):
                    r, t = divmod(lane, 4)
                    for byte in range(16):
                        v, h, i = byte // 8, byte // 4 % 2, byte % 4
                        k = 128 * b + 32 * (2 * c + v) + 16 * h + 4 * t + i
                        packed_BSN[b, s, 512 * c + 16 * lane + byte] = code(16 * s + r, k) | code(16 * s + r + 8, k) << 4
    return packed_BSN


@pytest.mark.parametrize(("outs", "ins"), [(64, 128), (80, 200)])
def test_every_byte_lies_where_the_matrix_unit_wants_it(outs: int, ins: int) -> None:
    """Number by number: chunks, lanes, bytes, nibbles, and zeros in what fills up."""
    given_OI = codes(outs, ins, 1)
    packed_BSN = pack(given_OI)
    assert packed_BSN.is_contiguous()
    assert torch.equal(packed_BSN, by_the_letter(given_OI))


def test_a_lane_holds_the_operand_of_its_own_place() -> None:
    """Registers of `wgmma` m64n*k32 with 8-bit operands: rows r and r + 8, inputs 4 t to 4 t + 3 and 16 further, of each 32."""
    given_OI = codes(64, 128, 5)
    words_CLW = pack(given_OI)[0, 0].view(2, 32, 16)
    for c, lane, v in [(0, 0, 0), (1, 31, 1), (0, 13, 1), (1, 18, 0)]:
        r, t, first = lane // 4, lane % 4, 32 * (2 * c + v)
        low, high = words_CLW[c, lane, 8 * v : 8 * v + 4] & 15, words_CLW[c, lane, 8 * v : 8 * v + 4] >> 4
        assert torch.equal(low, given_OI[r, first + 4 * t : first + 4 * t + 4])
        assert torch.equal(high, given_OI[r + 8, first + 4 * t : first + 4 * t + 4])
        further = words_CLW[c, lane, 8 * v + 4 : 8 * v + 8] & 15
        assert torch.equal(further, given_OI[r, first + 16 + 4 * t : first + 20 + 4 * t])


@settings(deadline=None, max_examples=60)
@given(outs=st.integers(1, 140), ins=st.integers(1, 300), seed=st.integers(0, 99))
def test_packing_undoes_unpacking_for_every_size(outs: int, ins: int, seed: int) -> None:
    """Ragged sizes included; what fills up slabs and blocks has code 0."""
    given_OI = codes(outs, ins, seed)
    packed_BSN, form = pack(given_OI), Int4Form(inputs=ins, outputs=outs, group=ins)
    assert packed_BSN.shape == (form.blocks, form.slabs, 1024)
    found_FK = unpack(packed_BSN)
    assert found_FK.shape == (form.filled_outputs, 128 * form.blocks)
    assert torch.equal(found_FK[:outs, :ins], given_OI)
    assert not found_FK[outs:].any()
    assert not found_FK[:, ins:].any()


@pytest.mark.parametrize(("outs", "filled"), [(1, 64), (64, 64), (80, 128), (1984, 1984), (2000, 2048)])
def test_outputs_fill_up_to_a_multiple_of_64(outs: int, filled: int) -> None:
    """So do scales and zeros, with 0."""
    form = Int4Form(inputs=256, outputs=outs, group=128)
    assert (form.filled_outputs, form.slabs) == (filled, filled // 16)
    rows_GF = fill_groups(torch.ones(2, outs), form)
    assert rows_GF.shape == (2, filled)
    assert rows_GF[:, :outs].all()
    assert not rows_GF[:, outs:].any()


def test_some_slabs_unpack_alone() -> None:
    """A piece of the outputs is read without the rest."""
    given_OI = codes(80, 300, 4)
    assert torch.equal(unpack(pack(given_OI)[:, 1:3])[:, :300], given_OI[16:48])


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 20), slabs=st.integers(1, 20), seed=st.integers(0, 99))
def test_zeros_come_back(groups: int, slabs: int, seed: int) -> None:
    """Two outputs to a byte, those of a slab that also share bytes of codes: r low and r + 8 high."""
    zeros_GF = codes(groups, 16 * slabs, seed)
    packed_GP = pack_zeros(zeros_GF)
    assert packed_GP.shape == (groups, 8 * slabs)
    assert torch.equal(unpack_zeros(packed_GP), zeros_GF)
    for slab, row in ((0, 0), (slabs - 1, 5)):
        pair = int(zeros_GF[0, 16 * slab + row]) | int(zeros_GF[0, 16 * slab + row + 8]) << 4
        assert int(packed_GP[0, 8 * slab + row]) == pair


@pytest.mark.parametrize("group", [WHOLE, 128])
def test_groups_lie_side_by_side_whatever_they_were_copied_from(group: int) -> None:
    """Scales and zeros stored output by output, as compressed-tensors' are, or of one group: a kernel is told one order."""
    size = 256 if group == WHOLE else group
    rows_OG = codes(64, 256 // size, 2)
    weight = int4_weight(codes(64, 256, 1), rows_OG.T.half(), rows_OG.T)
    assert weight.zeros is not None
    assert (weight.scales.stride(), weight.zeros.stride(), weight.packed.stride(1)) == ((64, 1), (32, 1), 1024)
    assert torch.equal(weight.scales, rows_OG.T.half())
    assert torch.equal(unpack_zeros(weight.zeros), rows_OG.T)


def test_inputs_that_fill_up_a_block_have_scales_of_0() -> None:
    """So a kernel may multiply whole blocks: 4544 inputs are 35.5 blocks, 71 groups of 64, and one row of zeros."""
    form = Int4Form(inputs=4544, outputs=2, group=64)
    assert (form.blocks, form.groups, form.group_rows) == (36, 71, 72)
    rows_GF = fill_groups(torch.ones(71, 2), form)
    assert rows_GF.shape == (72, 64)
    assert not rows_GF[71].any()
    assert Int4Form(inputs=200, outputs=1, group=200).group_rows == 2
    assert Int4Form(inputs=4096, outputs=1, group=128).group_rows == 32


@settings(deadline=None, max_examples=40)
@given(ins=st.integers(1, 6), group=st.sampled_from([16, 32, 64, 128, 256]), seed=st.integers(0, 99))
def test_zeros_leave_the_products_through_sums_of_the_inputs(ins: int, group: int, seed: int) -> None:
    """In each group, sum x (code - zero) = sum x code - zero sum x: it lets a kernel multiply codes alone, exact in integers."""
    inputs = ins * group
    codes_OI, zeros_GO = codes(5, inputs, seed).long(), codes(ins, 5, seed + 1).long()
    x_TI = torch.randint(-448, 449, (3, inputs), generator=torch.Generator().manual_seed(seed))
    x_TGS, codes_OGS = x_TI.view(3, ins, group), codes_OI.view(5, ins, group)
    whole = torch.einsum("tgs,ogs->tgo", x_TGS, codes_OGS - zeros_GO.T[..., None])
    parts = torch.einsum("tgs,ogs->tgo", x_TGS, codes_OGS) - zeros_GO * x_TGS.sum(-1, keepdim=True)
    assert torch.equal(whole, parts)


def test_codes_read_as_fp8_are_themselves_times_a_power_of_two() -> None:
    """The byte 0000qqqq is q / 512 in e4m3: a kernel needs no conversion, only a factor."""
    codes_16 = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(codes_16.view(torch.float8_e4m3fn).float() * 512, codes_16.float())


SHAPES = [(80, 256, 32), (1984, 128, 64), (64, 4544, 64), (24, 384, 128), (24, 200, WHOLE), (10, 96, 16)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("outs", "ins", "group"), SHAPES)
def test_a_product_is_that_of_the_meaning(outs: int, ins: int, group: int, *, zeros: bool) -> None:
    """Ragged outputs and inputs, every group size, with and without zero points."""
    weight, meaning_OI = made(outs, ins, group, zeros=zeros)
    x_TI = torch.randn(5, ins, generator=torch.Generator().manual_seed(4))
    assert_close(reference.linear_int4(x_TI, weight), x_TI.double() @ meaning_OI.T, op="linear_int4")
    assert torch.equal(torch.cat([weight.dequantise(rows) for rows in weight.pieces()]), meaning_OI.float())
    xq = reference.quantize_fp8_token(x_TI)
    found = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
    assert_close(found, xq.values_TI.double() * xq.scale.double() @ meaning_OI.T, op="linear_int4_fp8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_product_has_the_dtype_asked_for_and_is_rounded_once(tokens: int, dtype: torch.dtype) -> None:
    """Half-precision results are the float32 results, rounded; none for no tokens."""
    weight, _ = made(72, 256, 64, zeros=True, dtype=dtype)
    x_TI = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert torch.equal(reference.linear_int4(x_TI, weight), reference.linear_int4(x_TI.float(), weight).to(dtype))
    xq = reference.quantize_fp8_token(x_TI)
    wide = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
    assert torch.equal(reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, dtype), wide.to(dtype))
    assert wide.shape == (tokens, 72)


def test_a_product_holds_a_bounded_piece_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few bytes a piece may have, results are the same; a piece begins with a slab."""
    weight, _ = made(200, 256, 64, zeros=True)
    x_TI = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))
    xq, whole = reference.quantize_fp8_token(x_TI), reference.linear_int4(x_TI, weight)
    whole8 = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
    assert len(list(weight.pieces())) == 1
    monkeypatch.setitem(int4.PIECE_BYTES, "cpu", 1)
    assert [(rows.start, rows.stop) for rows in weight.pieces()] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    for found, expected in (
        (reference.linear_int4(x_TI, weight), whole),
        (reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32), whole8),
    ):
        assert relative_rms(found, expected) <= bound("linear_int4", torch.float32)


def test_the_oracle_sees_two_neighbouring_outputs_exchanged() -> None:
    """The comparison of this file can fail: nibbles of one byte exchanged are far beyond the bound."""
    weight, meaning_OI = made(64, 128, 64, zeros=False)
    wrong = Int4Weight(form=weight.form, packed=weight.packed >> 4 | weight.packed << 4, scales=weight.scales)
    x_TI = torch.randn(5, 128, generator=torch.Generator().manual_seed(4))
    assert relative_rms(reference.linear_int4(x_TI, wrong), x_TI.double() @ meaning_OI.T) > 1e4 * UNIT_ROUNDOFF[torch.float32]
