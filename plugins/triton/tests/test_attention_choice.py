"""Which kernel serves a prompt: the asynchronous one where it can, Triton's own for all else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attrs import evolve

from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock_triton import attention
from paddock_triton.attention import TritonAttention

HALF = torch.bfloat16


def _chosen(
    monkeypatch: pytest.MonkeyPatch,
    *,
    head: int = 128,
    dtype: torch.dtype = HALF,
    kv_dtype: torch.dtype = HALF,
    page: int = 64,
    hopper: bool = True,
    **features: Any,
) -> str:
    """Return which of the two was asked for a prompt of 5 tokens."""
    asked: list[str] = []
    monkeypatch.setattr(attention, "runs_on", lambda device: hopper)
    monkeypatch.setattr(attention, "prefill_async", lambda *_: asked.append("asynchronous"))
    monkeypatch.setattr(attention, "prefill", lambda *_: asked.append("tiles"))
    monkeypatch.setattr(TritonAttention, "_prefills", lambda *_: None)
    backend = TritonAttention(torch.device("cpu"))
    inputs = AttentionInputs(
        positions_T=torch.arange(5),
        slots_T=torch.arange(5),
        query_start_S1=torch.tensor([0, 5], dtype=torch.int32),
        seq_lens_S=torch.tensor([5], dtype=torch.int32),
        block_tables_SM=torch.zeros(1, 1, dtype=torch.int32),
        page_size=page,
        num_decodes=0,
        max_query_len=5,
        max_seq_len=5,
    )
    kv = LayerKV(*torch.zeros(2, 1, page, 2, head).to(kv_dtype))
    q_THD = torch.zeros(5, 4, head, dtype=dtype)
    backend.attend(q_THD, kv, evolve(inputs, prepared=backend.prepare(inputs)), AttentionParams(scale=1.0, **features))
    (which,) = asked
    return which


@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kv_dtype", [HALF, FP8])
def test_plain_heads_of_128_are_asynchronous(monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype, page: int) -> None:
    """Over pages of every size, of its own type and of FP8."""
    assert _chosen(monkeypatch, kv_dtype=kv_dtype, page=page) == "asynchronous"


@pytest.mark.parametrize(
    "other",
    [
        {"hopper": False},
        {"head": 64},
        {"head": 256},
        {"page": 48},
        {"page": 8},
        {"kv_dtype": torch.float16},
        {"alibi_slopes_H": torch.ones(4)},
        {"window": 3},
        {"softcap": 2.0},
    ],
    ids=lambda other: next(iter(other)),
)
def test_all_else_is_left_to_tiles(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    """Another device, head size, size or type of pages, or any feature."""
    assert _chosen(monkeypatch, **other) == "tiles"
