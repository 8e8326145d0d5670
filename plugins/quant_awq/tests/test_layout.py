"""The layout in memory: packing loses nothing, and the bytes are where the kernels are told they are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock_quant_awq.layout import BLOCK, HALF, Int4Form, fill_groups, pack, pack_zeros, unpack, unpack_zeros
from paddock_quant_awq.words import AWQ_ORDER, IN_ORDER
from paddock_quant_awq.words import pack as pack_words
from paddock_quant_awq.words import unpack as unpack_words

SIZES = st.integers(1, 300)


def codes(outs: int, ins: int, seed: int) -> torch.Tensor:
    """Return random codes 0..15."""
    return torch.randint(0, 16, (outs, ins), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(outs=st.integers(1, 40), ins=SIZES, seed=st.integers(0, 99))
def test_packing_undoes_unpacking_for_every_size(outs: int, ins: int, seed: int) -> None:
    """Ragged inputs included: the bytes are those of whole blocks, and the inputs that fill up the last have code 0."""
    given_OI = codes(outs, ins, seed)
    packed_BOJ = pack(given_OI)
    blocks = Int4Form(inputs=ins, outputs=outs, group=ins).blocks
    assert packed_BOJ.shape == (blocks, outs, HALF)
    assert packed_BOJ.is_contiguous()
    assert torch.equal(unpack(packed_BOJ, ins), given_OI)
    assert not unpack(packed_BOJ, blocks * BLOCK)[:, ins:].any()


def test_a_byte_holds_input_k_and_input_k_plus_64_of_a_block() -> None:
    """Input 128 b + j is the low nibble of byte j of block b, input 128 b + 64 + j the high one; outputs follow one another."""
    given_OI = codes(3, 384, 1)
    packed_BOJ = pack(given_OI)
    for b, o, j in [(0, 0, 0), (1, 2, 63), (2, 1, 17)]:
        byte = int(packed_BOJ[b, o, j])
        assert byte & 15 == given_OI[o, 128 * b + j]
        assert byte >> 4 == given_OI[o, 128 * b + 64 + j]
    assert packed_BOJ.stride() == (3 * HALF, HALF, 1)


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 20), outs=SIZES, seed=st.integers(0, 99))
def test_zeros_come_back_for_every_number_of_outputs(groups: int, outs: int, seed: int) -> None:
    """Two outputs to a byte, the even one low; an odd last one has a byte of its own."""
    zeros_GO = codes(groups, outs, seed)
    packed_GP = pack_zeros(zeros_GO)
    assert packed_GP.shape == (groups, (outs + 1) // 2)
    assert torch.equal(unpack_zeros(packed_GP, outs), zeros_GO)
    assert int(packed_GP[0, 0]) & 15 == zeros_GO[0, 0]


@settings(deadline=None, max_examples=40)
@given(count=SIZES, order=st.sampled_from([IN_ORDER, AWQ_ORDER]), seed=st.integers(0, 99))
def test_words_come_back_for_every_count(count: int, order: tuple[int, ...], seed: int) -> None:
    """Eight numbers to a word in either order, the last word filled up."""
    numbers = codes(3, count, seed)
    assert torch.equal(unpack_words(pack_words(numbers, order), order)[:, :count], numbers)


def test_words_with_every_bit_pattern_come_back() -> None:
    """Words whose highest bit is set are negative, and hold eight numbers all the same."""
    words = torch.empty(50, 3, dtype=torch.int32).random_(-(2**31), 2**31, generator=torch.Generator().manual_seed(0))
    assert bool((words < 0).any())
    for order in (IN_ORDER, AWQ_ORDER):
        assert torch.equal(pack_words(unpack_words(words, order), order), words)


def test_eight_numbers_in_a_row_are_known_words() -> None:
    """0..7 pack to 0x75316420 as AutoAWQ makes of them, and to 0x76543210 in GPTQ and compressed-tensors."""
    assert pack_words(torch.arange(8), AWQ_ORDER).tolist() == [0x75316420]
    assert pack_words(torch.arange(8), IN_ORDER).tolist() == [0x76543210]
    assert unpack_words(torch.tensor([0x75316420], dtype=torch.int32), AWQ_ORDER).tolist() == list(range(8))
    assert unpack_words(torch.tensor([0x76543210], dtype=torch.int32), IN_ORDER).tolist() == list(range(8))


def test_inputs_that_fill_up_a_block_have_scales_of_0() -> None:
    """So a kernel may multiply whole blocks: 4544 inputs are 35.5 blocks, 71 groups of 64, and one row of zeros."""
    form = Int4Form(inputs=4544, outputs=2, group=64)
    assert (form.blocks, form.groups, form.group_rows) == (36, 71, 72)
    rows_GO = fill_groups(torch.ones(71, 2), form)
    assert rows_GO.shape == (72, 2)
    assert not rows_GO[71].any()
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
