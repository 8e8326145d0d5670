"""Top-k, top-p and min-p against a plain reading of their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.execution import filters


def kept_plainly(row: Any, top_k: Any, top_p: Any, min_p: Any) -> Any:
    """Return the ids that stay: min-p, then top-k, then top-p, equals together."""
    best = max(row)
    alive = {i for i, x in enumerate(row) if math.exp(x - best) >= min_p}
    if top_k:
        kth = sorted((row[i] for i in alive), reverse=True)[: min(top_k, len(alive))][-1]
        alive = {i for i in alive if row[i] >= kth}
    total = sum(math.exp(row[i] - best) for i in alive)
    through, least = 0.0, best
    for i in sorted(alive, key=lambda i: -row[i]):
        if through >= top_p * total:
            break
        least = row[i]
        through += math.exp(row[i] - best)
    return {i for i in alive if row[i] >= least} if top_p < 1 else alive


def kept(rows: Any, top_ks: Any, top_ps: Any, min_ps: Any) -> Any:
    """Return what `threshold` keeps of each row."""
    scaled = torch.tensor(rows, dtype=torch.float32)
    scaled = scaled - scaled.max(-1, keepdim=True).values
    top_k, top_p = torch.tensor(top_ks), torch.tensor(top_ps, dtype=torch.float32)
    least = filters.threshold(scaled, top_k, top_p, torch.tensor(min_ps, dtype=torch.float32))
    return [set(np.flatnonzero(row)) for row in (scaled >= least).numpy()]


row = st.lists(st.integers(-12, 12).map(lambda x: x / 4), min_size=9, max_size=9)
setting = st.tuples(
    row, st.integers(0, 9), st.sampled_from([1.0, 0.93, 0.71, 0.37, 0.02]), st.sampled_from([0.0, 0.06, 0.33, 0.98])
)


@settings(max_examples=150, deadline=None)
@given(st.lists(setting, min_size=1, max_size=5))
def test_threshold_keeps_what_the_definitions_keep(settings_: Any) -> None:
    """Rows with different filters, many of their logits equal, keep what each would keep alone."""
    rows, top_ks, top_ps, min_ps = map(list, zip(*settings_, strict=True))
    assert kept(rows, top_ks, top_ps, min_ps) == [kept_plainly(*one) for one in settings_]


def test_equal_logits_stay_together() -> None:
    """Top-k 2 of three equal best tokens keeps all three, and so does a small top-p."""
    rows = [[1.0, 1.0, 1.0, 0.0]] * 2
    assert kept(rows, [2, 0], [1.0, 0.1], [0.0, 0.0]) == [{0, 1, 2}, {0, 1, 2}]


@pytest.mark.parametrize("spread", [0.001, 3.0])
def test_a_nucleus_wider_than_the_first_try_is_found(spread: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat and steep rows give the same nucleus whether or not a few candidates are tried first."""
    generator = torch.Generator().manual_seed(5)
    rows = (torch.randn(3, 4000, generator=generator) * spread).tolist()
    tried = kept(rows, [0, 2000, 3], [0.9, 0.9, 1.0], [0.0] * 3)
    monkeypatch.setattr(filters, "_FIRST_TRY", 10**6)
    assert tried == kept(rows, [0, 2000, 3], [0.9, 0.9, 1.0], [0.0] * 3)
    assert tried[0] == kept_plainly(rows[0], 0, 0.9, 0.0)
