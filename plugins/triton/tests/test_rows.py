"""How rows are laid over programs."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("triton")

from paddock_triton.rows import blocks_of, pieces_of


def test_a_row_s_pieces_are_the_fewest_of_which_none_is_longer_than_it_must_be() -> None:
    """However many programs there are to a row, one piece fewer would make the longest piece longer; there is always one."""
    for blocks, most in product((1, 2, 16, 63, 125), range(140)):
        pieces, longest = pieces_of(blocks, most), blocks_of(blocks, max(most, 1))
        assert 1 <= pieces <= max(most, 1)
        assert blocks_of(blocks, pieces) == longest
        assert pieces == 1 or blocks_of(blocks, pieces - 1) > longest


@pytest.mark.parametrize(("most", "pieces"), [(0, 1), (1, 1), (16, 16), (20, 16), (31, 21), (32, 32), (62, 32), (63, 63)])
def test_63_blocks_are_cut_as_evenly_as_they_can_be(most: int, pieces: int) -> None:
    """For 31 programs 21 pieces of three blocks: 31 pieces would not be shorter."""
    assert pieces_of(63, most) == pieces
