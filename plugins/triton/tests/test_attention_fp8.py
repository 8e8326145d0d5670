"""Attention in FP8 arithmetic against its plain-torch definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve

pytest.importorskip("triton")

from paddock.layers import AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock.testing.kernels import AttentionCase
from paddock_triton.attention import TritonAttention
from paddock_triton.attention_async import serves

ON_GPU = torch.cuda.is_available()
HALVES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)  # the interpreter cuts bfloat16 off
HEADS = (
    [(8, 1, 128), (9, 3, 64), (16, 1, 80), (29, 1, 64), (71, 1, 64), (4, 2, 256), (6, 2, 16)]
    if ON_GPU
    else [(6, 2, 32), (3, 1, 48), (4, 2, 16)]
)
BATCH = [(0, 1), (70, 1), (33, 1), (0, 17), (63, 66)] + ([(300, 1), (300, 270)] if ON_GPU else [])
FEATURES = ("", "alibi", "sliding_window", "softcap")
Q_SCALES = (None, 0.0123)  # in turn where there is no GPU: each feature has both, and each shape of heads


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_fp8_arithmetic_is_the_definition_s(
    heads: tuple[int, int, int], feature: str, case: Callable[..., AttentionCase]
) -> None:
    """Decodes, split ones too, and prefills at page edges, with a scale a query and head, and with a stored one."""
    for turn, dtype in enumerate(HALVES):
        step = case(BATCH, heads, dtype=dtype, page_size=(16, 64)[turn % 2], kv_dtype=FP8)
        params = evolve(step.params(*filter(None, [feature])), in_fp8=True)
        for q_scale in Q_SCALES if ON_GPU else (Q_SCALES[(HEADS.index(heads) + FEATURES.index(feature)) % 2],):
            stored = None if q_scale is None else torch.tensor(q_scale, device=step.q_THD.device)
            given = evolve(params, q_scale=stored)
            step.check(step.attend(TritonAttention(step.q_THD.device), given), given, f"{heads} {feature} {q_scale}")


@pytest.mark.usefixtures("rounding")
def test_fp8_arithmetic_is_not_that_of_16_bits(case: Callable[..., AttentionCase]) -> None:
    """Queries and probabilities are rounded: plain attention over the same pages is further off than any kernel may be."""
    step = case([(70, 1), (0, 66)], (6, 2, 32), dtype=torch.float16, page_size=16, kv_dtype=FP8)
    params = step.params()
    found = step.attend(TritonAttention(step.q_THD.device), params)
    step.check(found, params)
    with pytest.raises(AssertionError, match=r"attention_fp8 .* relative RMS"):
        step.check(found, evolve(params, in_fp8=True))


def test_prompts_in_fp8_arithmetic_are_not_converted() -> None:
    """The asynchronous kernel multiplies in 16 bits, so it is not what serves them."""
    pages, q_THD = torch.zeros(2, 1, 64, 2, 128).to(FP8), torch.zeros(5, 4, 128, dtype=torch.bfloat16)
    kv = LayerKV(*pages)
    params = AttentionParams(scale=1.0)
    assert serves(q_THD, kv, params)
    assert not serves(q_THD, kv, evolve(params, in_fp8=True))
