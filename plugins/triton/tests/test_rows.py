"""How rows are laid over programs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from paddock_triton.rows import pieces_of


def test_a_row_s_pieces_are_few_numbers_and_fill_most_of_what_there_is() -> None:
    """Every number is a kernel of its own: of any number of rows seven are left, none with less than half the programs."""
    programs, blocks = 1056, 63
    pieces = {rows: pieces_of(blocks, programs // rows) for rows in range(1, 1200)}
    assert all(1 <= count <= max(1, programs // rows) for rows, count in pieces.items())
    assert all(2 * count > min(blocks, programs // rows) for rows, count in pieces.items())
    assert sorted(set(pieces.values())) == [1, 2, 4, 8, 16, 32, 63]
