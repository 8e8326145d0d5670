"""Rotary frequencies are those the published models were trained with."""

from __future__ import annotations

import math

import pytest
import torch

from paddock.layers.rope import cos_sin_table, inverse_frequencies
from paddock.model_config import RopeSpec

LLAMA3 = {"kind": "llama3", "theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


@pytest.mark.parametrize(
    ("head_dim", "factor", "expected"),
    [
        (128, 8.0, {0: 1.0, 28: 3.21144599e-3, 29: 2.16657076e-3, 34: 1.78507813e-4, 35: 9.55621235e-5, 63: 3.06892599e-7}),
        (64, 32.0, {14: 3.21144599e-3, 15: 1.29054793e-3, 18: 1.94616382e-5}),
    ],
    ids=["llama-3.1", "llama-3.2-1b"],
)
def test_llama3_frequencies_are_the_published_ones(head_dim: int, factor: float, expected: dict[int, float]) -> None:
    """Frequencies kept, blended and divided match values computed with transformers."""
    spec = RopeSpec(factor=factor, **LLAMA3)  # type: ignore[arg-type]
    found = inverse_frequencies(spec, head_dim=head_dim, max_model_len=131072)
    for index, value in expected.items():
        assert found[index].item() == pytest.approx(value, rel=1e-6)


def test_a_row_of_the_table_holds_cosines_then_sines() -> None:
    """Row t of the table is cos and sin of t times each frequency."""
    table = cos_sin_table(RopeSpec(theta=100.0), head_dim=4, max_model_len=5, device=torch.device("cpu"))
    assert table[3].tolist() == pytest.approx([math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)], rel=1e-6)


def test_dynamic_frequencies_do_not_depend_on_the_position() -> None:
    """The table of a longer limit is not a longer table: the base is chosen once, for max_model_len."""
    spec = RopeSpec(theta=1e4, kind="dynamic", factor=2.0, original_max_position=32)
    plain = inverse_frequencies(RopeSpec(theta=1e4), head_dim=16, max_model_len=32)
    assert torch.equal(inverse_frequencies(spec, head_dim=16, max_model_len=20), plain)
    assert torch.equal(inverse_frequencies(spec, head_dim=16, max_model_len=32), plain)
    assert inverse_frequencies(spec, head_dim=16, max_model_len=64)[-1] < plain[-1]
