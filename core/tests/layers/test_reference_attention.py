"""The plain-torch attention is causal attention, whatever the pages, lengths and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paddock.layers.reference_attention import create
from paddock.testing.kernels import check_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_equals_dense_attention(dtype: torch.dtype) -> None:
    """Every head shape, page border, mix of decodes and prefills, and head feature agrees with float64."""
    check_attention(create, dtypes=[dtype], page_sizes=[16], heads=[(1, 1, 32), (9, 3, 64), (8, 1, 16)])


@pytest.mark.parametrize("feature", ["alibi", "sliding_window", "softcap"])
def test_attention_features_equal_dense_attention(feature: str) -> None:
    """Biases, windows and caps agree in decodes and prefills alike."""
    check_attention(create, page_sizes=[32], features=[feature], heads=[(6, 2, 16)])


def test_attention_reads_fp8_pages_through_their_scales() -> None:
    """FP8 pages give what their dequantised values give."""
    check_attention(create, page_sizes=[16], heads=[(4, 2, 32)], fp8_pages=True)


def test_a_wrong_backend_is_caught() -> None:
    """The contract fails for a backend that forgets causality, and for one that leaves outputs unwritten."""

    class Forgetful:
        def __init__(self, *, writes: bool) -> None:
            self.inner, self.writes = create(None, torch.device("cpu")), writes  # type: ignore[arg-type]

        def prepare(self, inputs: Any) -> Any:
            return self.inner.prepare(inputs)

        def attend(self, q_THD: torch.Tensor, kv: Any, inputs: Any, params: Any) -> torch.Tensor:
            out_THD = torch.empty_like(q_THD)
            if self.writes:
                out_THD.copy_(self.inner.attend(q_THD, kv, inputs, params)).mul_(1.01)
            return out_THD

    for writes in (True, False):
        with pytest.raises(AssertionError, match="relative RMS"):
            check_attention(lambda needs, device: Forgetful(writes=writes), heads=[(1, 1, 32)])  # noqa: B023
