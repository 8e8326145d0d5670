"""The steps attention is measured at: decodes, prompts and both, over shuffled pages.

T tokens, S sequences, H query heads, K KV heads, D head size, N pages, P tokens a page, L tokens of a sequence, M pages of one.
"""

from __future__ import annotations

import itertools
import random

import torch
from attrs import frozen
from torch import Tensor

from paddock.bench.kernels.case import ATTENTION, Case, Draw
from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock.plugins import AttentionNeeds

LLAMA_70B, LLAMA_8B, FALCON_180B, FALCON_7B = (64, 8, 128), (32, 8, 128), (232, 8, 64), (71, 1, 64)
RAGGED = tuple(random.Random(0).choices(range(100, 4097), k=64))


@frozen(kw_only=True)
class Step:
    """Sequences that decode, by their lengths, then prompts, by theirs; `page` where it is not the backend's choice.

    With `in_fp8` attention multiplies in FP8, over FP8 pages alone.
    """

    name: str
    heads: tuple[int, int, int]
    decodes: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    page: int | None = None
    in_fp8: bool = False

    @property
    def lens(self) -> tuple[int, ...]:
        """Return the tokens of every sequence, this step's included."""
        return (*self.decodes, *self.prompts)

    @property
    def news(self) -> tuple[int, ...]:
        """Return this step's tokens of every sequence."""
        return (*(1 for _ in self.decodes), *self.prompts)

    def needs(self) -> AttentionNeeds:
        """Return what a backend is asked for."""
        num_heads, num_kv_heads, head_dim = self.heads
        return AttentionNeeds(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)

    def flops(self) -> float:
        """Return the operations of the causal products with K and V."""
        num_heads, _, head_dim = self.heads
        pairs = sum(new * length - new * (new - 1) // 2 for length, new in zip(self.lens, self.news, strict=True))
        return 4.0 * num_heads * head_dim * pairs

    def nbytes(self, item: int, kv_item: int) -> int:
        """Return the bytes of K and V, of the queries and of the output, once."""
        num_heads, num_kv_heads, head_dim = self.heads
        return 2 * head_dim * (sum(self.lens) * num_kv_heads * kv_item + sum(self.news) * num_heads * item)


STEPS = (
    Step(name="decode 64 x 2k", heads=LLAMA_70B, decodes=(2048,) * 64),
    Step(name="decode 64 x 8k", heads=LLAMA_70B, decodes=(8192,) * 64),
    Step(name="decode 64 x 100..4096", heads=LLAMA_70B, decodes=RAGGED),
    Step(name="decode 1 x 131k", heads=LLAMA_70B, decodes=(131072,)),
    Step(name="decode 1 x 1k", heads=LLAMA_8B, decodes=(1024,)),
    Step(name="decode 256 x 1k", heads=LLAMA_8B, decodes=(1024,) * 256),
    Step(name="decode 64 x 2k, Falcon-180B heads", heads=FALCON_180B, decodes=(2048,) * 64),
    Step(name="decode 64 x 2k, MQA 71", heads=FALCON_7B, decodes=(2048,) * 64),
    Step(name="prefill 1 x 8k", heads=LLAMA_70B, prompts=(8192,)),
    Step(name="prefill 4 x 2k", heads=LLAMA_70B, prompts=(2048,) * 4),
    Step(name="prefill 1 x 8k, pages of 128", heads=LLAMA_70B, prompts=(8192,), page=128),
    Step(name="prefill 1 x 4k, Falcon-180B heads", heads=FALCON_180B, prompts=(4096,)),
    Step(name="decode 64 x 2k, FP8 products", heads=LLAMA_70B, decodes=(2048,) * 64, in_fp8=True),
    Step(name="prefill 1 x 8k, FP8 products", heads=LLAMA_70B, prompts=(8192,), in_fp8=True),
    Step(name="prefill 4 x 2k, FP8 products", heads=LLAMA_70B, prompts=(2048,) * 4, in_fp8=True),
    Step(name="mixed 32 x 2k decode, 1 x 2k prefill", heads=LLAMA_70B, decodes=(2048,) * 32, prompts=(2048,)),
)
SMALL_STEPS = (
    Step(name="decode 3 x 20", heads=(4, 2, 16), decodes=(20,) * 3),
    Step(name="decode 17, 40, 1", heads=(4, 2, 16), decodes=(17, 40, 1)),
    Step(name="prefill 2 x 33", heads=(4, 2, 16), prompts=(33, 33)),
    Step(name="decode 17, 40, 1, FP8 products", heads=(4, 2, 16), decodes=(17, 40, 1), in_fp8=True),
    Step(name="prefill 2 x 33, FP8 products", heads=(4, 2, 16), prompts=(33, 33), in_fp8=True),
    Step(name="mixed 2 x 20 decode, 1 x 33 prefill", heads=(4, 2, 16), decodes=(20, 20), prompts=(33,)),
)


@frozen(eq=False, kw_only=True)
class Laid:
    """A step laid out in pages of one size and type: the inputs every call shares, and its case, whose sets are layers."""

    step: Step
    inputs: AttentionInputs
    params: AttentionParams
    case: Case

    @property
    def fp8_pages(self) -> bool:
        """Return whether K and V are stored in FP8."""
        return self.params.k_scale is not None


def case_name(step: Step, *, page_size: int, fp8_pages: bool) -> str:
    """Return what a step's case is called over such pages."""
    name = f"{step.name}, FP8 KV" if fp8_pages else step.name
    return f"{name}, pages of {page_size}" if step.page is None else name


def laid_out(step: Step, *, page_size: int, kv_dtype: torch.dtype, draw: Draw) -> Laid:
    """Return a step over shuffled pages; its case makes (q_THD, LayerKV) of random data."""
    counts = [-(-length // page_size) for length in step.lens]
    shape = (sum(counts), page_size, *step.heads[1:])

    def layer(seed: int) -> tuple[Tensor, LayerKV]:
        kv = LayerKV(*(draw.normal(3 * seed + half, *shape).to(kv_dtype) for half in (1, 2)))
        return draw.normal(3 * seed, sum(step.news), step.heads[0], step.heads[2]), kv

    scale = torch.ones((), device=draw.device) if kv_dtype == FP8 else None
    return Laid(
        step=step,
        inputs=_inputs(step, counts, page_size, draw),
        params=AttentionParams(scale=step.heads[2] ** -0.5, k_scale=scale, v_scale=scale, in_fp8=step.in_fp8),
        case=Case(
            name=case_name(step, page_size=page_size, fp8_pages=kv_dtype == FP8),
            make=layer,
            nbytes=step.nbytes(draw.dtype.itemsize, kv_dtype.itemsize),
            flops=step.flops(),
            kind=ATTENTION,
        ),
    )


def _inputs(step: Step, counts: list[int], page_size: int, draw: Draw) -> AttentionInputs:
    tables = torch.split_with_sizes(draw.order(0, sum(counts)).int(), counts)
    tables_SM = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    starts = [0, *itertools.accumulate(step.news)]
    positions = [p for length, new in zip(step.lens, step.news, strict=True) for p in range(length - new, length)]
    sequences = [s for s, new in enumerate(step.news) for _ in range(new)]
    positions_T = torch.tensor(positions, device=draw.device)
    pages_T = tables_SM[torch.tensor(sequences, device=draw.device), positions_T // page_size].long()
    return AttentionInputs(
        positions_T=positions_T,
        slots_T=pages_T * page_size + positions_T % page_size,
        query_start_S1=torch.tensor(starts, dtype=torch.int32, device=draw.device),
        seq_lens_S=torch.tensor(step.lens, dtype=torch.int32, device=draw.device),
        block_tables_SM=tables_SM,
        page_size=page_size,
        num_decodes=len(step.decodes),
        max_query_len=max(step.news),
        max_seq_len=max(step.lens),
    )


def rows_of(laid: Laid, pages_NPKD: Tensor, sequence: int) -> Tensor:
    """Return what the pages hold of a sequence [L, K, D]."""
    length = laid.step.lens[sequence]
    table_M = laid.inputs.block_tables_SM[sequence, : -(-length // laid.inputs.page_size)].long()
    return pages_NPKD.view(torch.uint8)[table_M].view(pages_NPKD.dtype).flatten(0, 1)[:length]
