"""Words of a checkpoint: packing loses nothing, and numbers are in the order the tools write."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock_quant_awq.words import AWQ_ORDER, IN_ORDER, pack, unpack


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 300), order=st.sampled_from([IN_ORDER, AWQ_ORDER]), seed=st.integers(0, 99))
def test_words_come_back_for_every_count(count: int, order: tuple[int, ...], seed: int) -> None:
    """Eight numbers to a word in either order, the last word filled up."""
    numbers = torch.randint(0, 16, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack(pack(numbers, order), order)[:, :count], numbers)


def test_words_with_every_bit_pattern_come_back() -> None:
    """Words whose highest bit is set are negative, and hold eight numbers all the same."""
    words = torch.empty(50, 3, dtype=torch.int32).random_(-(2**31), 2**31, generator=torch.Generator().manual_seed(0))
    assert bool((words < 0).any())
    for order in (IN_ORDER, AWQ_ORDER):
        assert torch.equal(pack(unpack(words, order), order), words)


def test_eight_numbers_in_a_row_are_known_words() -> None:
    """0..7 pack to 0x75316420 as AutoAWQ makes of them, and to 0x76543210 in GPTQ and compressed-tensors."""
    assert pack(torch.arange(8), AWQ_ORDER).tolist() == [0x75316420]
    assert pack(torch.arange(8), IN_ORDER).tolist() == [0x76543210]
    assert unpack(torch.tensor([0x75316420], dtype=torch.int32), AWQ_ORDER).tolist() == list(range(8))
    assert unpack(torch.tensor([0x76543210], dtype=torch.int32), IN_ORDER).tolist() == list(range(8))
