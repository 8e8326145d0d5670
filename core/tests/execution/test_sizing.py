"""The largest step is as large as the limits allow, and pages take what is left of the device, no more than was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.tests.planning.made import planned
from hypothesis import given
from hypothesis import strategies as st

from paddock.errors import PlanError
from paddock.execution.kvcache import allocate_kv
from paddock.execution.sampling_ops import REFERENCE_OPS
from paddock.execution.sizing import LargestStep, pages_with_room, run_largest
from paddock.planning.hardware import GIB

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@given(st.integers(1, 9000), st.integers(1, 300), st.integers(1, 5000))
def test_the_largest_step_fills_the_limits(tokens: int, sequences: int, longest: int) -> None:
    """As many tokens as may be, in as many sequences as may run, none longer than one may get."""
    lengths = LargestStep(tokens=tokens, sequences=sequences, max_model_len=longest).lengths()
    assert sum(lengths) == min(tokens, sequences * longest)
    assert len(lengths) == min(sequences, tokens)
    assert 1 <= min(lengths) <= max(lengths) <= longest


def test_the_largest_step_reads_and_writes_one_page() -> None:
    """Prompts longer than the page all stay within it, and each sequence has a row of logits."""
    seen: list[Any] = []

    class Model:
        def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
            return token_ids_T[:, None].float()

        def forward(self, x_TE: torch.Tensor, inputs: Any, kv: Any) -> torch.Tensor:
            assert inputs.slots_T.max() < 4
            assert not inputs.block_tables_SM.any()
            seen.append((inputs.seq_lens_S.tolist(), inputs.positions_T.tolist()))
            return x_TE

        def logits(self, x_RE: torch.Tensor) -> torch.Tensor:
            seen.append(len(x_RE))
            return torch.zeros(len(x_RE), 32)

    class Backend:
        def prepare(self, inputs: Any) -> None:
            """Prepare nothing."""

        def attend(self, q_THD: torch.Tensor, *rest: Any) -> torch.Tensor:
            return q_THD

    kv = allocate_kv(num_layers=1, num_pages=1, page_size=4, num_kv_heads=1, head_dim=1, dtype="float32", device=CPU)
    model: Any = Model()
    run_largest(model, Backend(), kv, REFERENCE_OPS, LargestStep(tokens=15, sequences=2, max_model_len=64), CPU)
    assert seen == [([8, 7], [*range(8), *range(7)]), 2]


def test_pages_take_what_the_device_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budget less what is gone since planning, less what graphs are to take; a page is kept for padding."""
    plan = planned()
    ledger, available = plan.ledger, plan.hardware.available_bytes
    for gone in (1 * GIB, 20 * GIB):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gone=gone: (available - gone, available))
        pages = pages_with_room(ledger, available_bytes=available, asked_bytes=None, device=CUDA)
        left = ledger.budget_bytes - gone - ledger.graph_bytes - (pages + 1) * ledger.page_bytes
        assert 0 <= left < ledger.page_bytes


def test_no_more_pages_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An asked size bounds the pages; where not one fits the error says what took the memory."""
    plan = planned()
    ledger, available = plan.ledger, plan.hardware.available_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (available - GIB, available))
    asked = 7 * ledger.page_bytes
    assert pages_with_room(ledger, available_bytes=available, asked_bytes=asked, device=CUDA) == 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, available))
    with pytest.raises(PlanError, match="no KV page fits"):
        pages_with_room(ledger, available_bytes=available, asked_bytes=None, device=CUDA)
