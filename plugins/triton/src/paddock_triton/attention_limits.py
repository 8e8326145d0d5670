"""What attention needs beside the pages. Free of torch and of triton: planning calls it."""

from __future__ import annotations

from paddock.plugins import AttentionNeeds

_PROGRAMS = 4 * 132  # as many pieces of decodes as an H200 gets, beside one for each sequence
_FLOAT = 4


def workspace(needs: AttentionNeeds, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Return the bytes of one layer's decode pieces, in float32, each with its weight; the schedules are small beside them."""
    units = max_num_seqs + _PROGRAMS // needs.num_kv_heads
    return units * needs.num_heads * (needs.head_dim + 1) * _FLOAT
