"""A model as a plan says, with what attends for it and nothing around them: an engine keeps its logits to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from paddock import assemble
from paddock.config import EngineConfig
from paddock.execution.build import build_model, fill_model
from paddock.execution.kvcache import DTYPES
from paddock.layers import AttentionBackend
from paddock.planning import rebuild
from paddock.planning.plan import Plan
from paddock.plugins import resolve
from paddock.testing.paging import Pages


@frozen(eq=False, kw_only=True)
class Built:
    """A loaded model, its backend and the plan of both."""

    plan: Plan
    model: Any
    backend: AttentionBackend

    def pages(self, count: int, *, length: int) -> Pages:
        """Return pages for `count` sequences of up to `length` tokens."""
        needs = rebuild.attention_needs(self.plan)
        return Pages(
            num_layers=self.plan.num_layers,
            num_kv_heads=needs.num_kv_heads,
            head_dim=needs.head_dim,
            page_size=self.plan.page_size,
            num_pages=count * -(-length // self.plan.page_size),
            dtype=DTYPES[self.plan.kv_cache_dtype],
            device=self.plan.hardware.device,
        )


def build(folder: Path, **options: Any) -> Built:
    """Return what an engine with these options would be built around; `max_model_len` and the like as for LLM."""
    plan = assemble.plan(EngineConfig.from_options(str(folder), **options))
    device = torch.device(plan.hardware.device)
    backend = resolve(plan.attention.factory)(rebuild.attention_needs(plan), device)
    model = build_model(plan, backend, device)
    fill_model(plan, model, folder, device)
    return Built(plan=plan, model=model, backend=backend)
