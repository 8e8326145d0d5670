"""Attention in FP8 arithmetic, as plain torch defines it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from attrs import evolve
from torch import Tensor

from paddock.layers import AttentionParams
from paddock.layers.fp8_attention import attend_in_fp8
from paddock.layers.reference import FP8
from paddock.layers.reference_attention import create
from paddock.testing.kernels import AttentionCase, attention_case
from paddock.testing.oracle import relative_rms

BATCH = [(0, 1), (70, 1), (33, 1), (0, 17), (63, 66)]


def _step(batch: Sequence[tuple[int, int]] = BATCH, dtype: torch.dtype = torch.float32) -> AttentionCase:
    return attention_case(batch, (6, 2, 32), dtype=dtype, page_size=16, kv_dtype=FP8)


def _attend(step: AttentionCase, params: AttentionParams) -> Tensor:
    return step.attend(create(step.needs, step.q_THD.device), params)


@pytest.mark.parametrize("features", [(), ("alibi",), ("sliding_window",), ("softcap",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_plain_attention_s_but_for_roundings_to_fp8(dtype: torch.dtype, features: tuple[str, ...]) -> None:
    """A few percent off, as 3 bits of a mantissa are, for decodes and prefills, whatever the feature; and never equal."""
    step = _step(dtype=dtype)
    params = step.params(*features)
    plain = _attend(step, params)
    for q_scale in (None, torch.tensor(0.01)):
        assert 0.01 < relative_rms(_attend(step, evolve(params, in_fp8=True, q_scale=q_scale)), plain) < 0.04


def test_what_fp8_holds_is_computed_exactly() -> None:
    """Queries with a scale that is a power of two and logits that are whole in base 2: nothing is rounded."""
    q_QHD = torch.tensor([1.75, -0.5, 0.25, 1.0]).repeat(2, 2, 1)
    k_LKD = torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 8, 3]])[:, None].to(FP8)
    v_LKD = torch.tensor([[1.0, 2, 3, 4], [-7, 0, 5, 1], [16, 8, 4, 2]])[:, None].to(FP8)
    scale, k_scale = torch.log(torch.tensor(2.0)).item(), torch.tensor(1.0)
    params = AttentionParams(scale=scale, k_scale=k_scale, v_scale=torch.tensor(0.5), in_fp8=True)
    found = attend_in_fp8(q_QHD, k_LKD, v_LKD, params)
    power_QL = torch.tensor([[2.0**7, 2.0**-2, 0.0], [2.0**7, 2.0**-2, 2.0**5]])
    expected = (power_QL @ v_LKD[:, 0].float()) * 0.5 / power_QL.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected[:, None].expand(2, 2, 4), rtol=1e-6, atol=0)


def test_one_key_gives_its_value() -> None:
    """Whatever its logit rounds to, the output is divided by the same."""
    step = _step([(0, 1)])
    params = step.params()
    torch.testing.assert_close(_attend(step, evolve(params, in_fp8=True)), _attend(step, params), rtol=1e-6, atol=0)


def test_a_prompt_is_its_tokens_one_by_one() -> None:
    """Each query is rounded by itself, so a row of a prefill is the decode of the same token."""
    step = _step([(63, 66)])
    params = evolve(step.params("alibi"), in_fp8=True)
    whole = _attend(step, params)
    for token in (0, 1, 40, 65):
        inputs = evolve(
            step.inputs,
            query_start_S1=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens_S=torch.tensor([63 + token + 1], dtype=torch.int32),
            num_decodes=1,
        )
        alone = _attend(evolve(step, q_THD=step.q_THD[token : token + 1], inputs=inputs), params)
        assert relative_rms(alone[0], whole[token]) < 2e-3  # a sum in another order may tip a probability


def test_a_query_s_scale_is_its_own() -> None:
    """Queries of one head a thousand times as large as another's are rounded as finely; by a stored scale they saturate."""
    step = _step([(0, 17)])
    large = evolve(step, q_THD=step.q_THD * torch.tensor([1, 1000.0, 1, 1, 1, 1])[:, None])
    params = evolve(step.params(), in_fp8=True)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(_attend(large, params)[:, others], _attend(step, params)[:, others])
    stored = evolve(params, q_scale=torch.tensor(1e-3))  # 448 of it is 0.448
    clipped = evolve(step, q_THD=step.q_THD.clamp(-0.448, 0.448))
    torch.testing.assert_close(_attend(step, stored), _attend(clipped, stored))
