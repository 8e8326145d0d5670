"""How many pages there is room for, once the weights are in and the largest step has been run: measured, not estimated.

T tokens, S sequences, N pages.
"""

from __future__ import annotations

import torch
from attrs import evolve, frozen

from paddock.errors import PlanError
from paddock.execution.sampling_ops import SamplingOps
from paddock.layers.attention import AttentionBackend, AttentionInputs, LayerKV, Model
from paddock.planning.hardware import GIB
from paddock.planning.plan import Ledger, Plan


@frozen(kw_only=True)
class LargestStep:
    """The most a step may hold: tokens, sequences, and tokens of a sequence."""

    tokens: int
    sequences: int
    max_model_len: int

    @classmethod
    def of(cls, plan: Plan) -> LargestStep:
        """Return the largest step that a plan allows."""
        return cls(tokens=plan.max_num_batched_tokens, sequences=plan.max_num_seqs, max_model_len=plan.max_model_len)

    def lengths(self) -> list[int]:
        """Return the lengths of prompts that make such a step: as many as may run, together as long as may be."""
        tokens = min(self.tokens, self.sequences * self.max_model_len)
        count = min(self.sequences, tokens)
        return [tokens // count + (i < tokens % count) for i in range(count)]


@torch.inference_mode()
def run_largest(
    model: Model, backend: AttentionBackend, kv: list[LayerKV], ops: SamplingOps, step: LargestStep, device: torch.device
) -> None:
    """Run a step of prompts over the first page of `kv`, sampled greedily; the allocator keeps what it took."""
    lengths = step.lengths()
    page_size, tokens = kv[0].page_size, sum(lengths)
    ends_S = torch.tensor(lengths, device=device).cumsum(0)
    starts_S1 = torch.cat((ends_S.new_zeros(1), ends_S)).to(torch.int32)
    positions_T = torch.arange(tokens, device=device) - torch.repeat_interleave(
        starts_S1[:-1].long(), starts_S1.diff().long(), output_size=tokens
    )
    longest = max(lengths)
    inputs = AttentionInputs(
        positions_T=positions_T,
        slots_T=positions_T % page_size,
        query_start_S1=starts_S1,
        seq_lens_S=starts_S1.diff(),
        block_tables_SM=torch.zeros(len(lengths), -(-longest // page_size), dtype=torch.int32, device=device),
        page_size=page_size,
        num_decodes=0,
        max_query_len=longest,
        max_seq_len=longest,
    )
    x_TE = model.embed(torch.zeros(tokens, dtype=torch.int64, device=device))
    x_TE = model.forward(x_TE, evolve(inputs, prepared=backend.prepare(inputs)), kv)
    ops.most_likely(model.logits(x_TE.index_select(0, ends_S - 1)))


def pages_with_room(ledger: Ledger, *, available_bytes: int, asked_bytes: int | None, device: torch.device) -> int:
    """Return the pages that fit what is free now, what captured steps will take set aside; no more than were asked for.

    `available_bytes` were free when the plan was made: what is gone of them since is the weights, the allocator's reserve for the
    largest step, and the driver's own. One page is kept for padding. Raises PlanError where no page fits; whether the pages hold
    a sequence is for the scheduler's limits to say.
    """
    free, _ = torch.cuda.mem_get_info(device)
    room = ledger.budget_bytes - max(0, available_bytes - free) - ledger.graph_bytes
    if asked_bytes is not None:
        room = min(room, asked_bytes + ledger.page_bytes)
    pages = room // ledger.page_bytes - 1
    if pages < 1:
        taken, budget = (size / GIB for size in (available_bytes - free, ledger.budget_bytes))
        raise PlanError(
            f"weights and the largest step take {taken:.2f} GiB of the {budget:.2f} GiB that may be used: "
            "no KV page fits what is left",
            fix="lower max_num_batched_tokens or max_num_seqs, or raise gpu_memory_utilization",
        )
    return pages
