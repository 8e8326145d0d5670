"""What a watcher keeps of rows that come in pieces."""

from __future__ import annotations

import pytest
import torch

from paddock.evaluation.last_rows import LastRows


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("at", [0, 2, 3, 6])
def test_the_row_is_found_in_whatever_piece_it_comes(size: int, at: int) -> None:
    """First, last or amid its piece; rows of other prompts, and the same ones again, change nothing."""
    logits_TV = torch.randn(7, 11, generator=torch.Generator().manual_seed(size))
    rows = LastRows({12: (at, [4, 0, 10])})
    for turn in range(2):
        for start in range(0, 7, size):
            rows.watch("3-12#0", start, logits_TV[start : start + size])
            rows.watch("12-3#0", start, logits_TV[start : start + size] + turn)
    expected = logits_TV[at].log_softmax(0)[[4, 0, 10]]
    assert rows.logprobs(12) == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.raises(KeyError):
        rows.logprobs(3)
