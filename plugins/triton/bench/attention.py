"""Time of attention, as the backend runs it, over the roof: python plugins/triton/bench/attention.py [--json FILE].

A time is the median of CUDA graphs of several calls, over the number of calls; the schedule, made once a step for all layers, is
not in it. KV is random, its pages shuffled; decodes read far more of it than the L2 holds, except where a line says few bytes.
Bytes are those of K and V, once; operations those of the causal half. H query heads, K KV heads, D head size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from attrs import asdict, evolve, frozen

from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.plugins import AttentionNeeds
from paddock_triton.attention import create

BYTES_ROOF, FLOPS_ROOF = 4.3e12, 570e12  # an H200's device-to-device copy; torch's cuDNN attention on it
CUDA = torch.device("cuda")
DTYPES = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
LLAMA_70B, LLAMA_8B, FALCON_180B, FALCON_7B = (64, 8, 128), (32, 8, 128), (232, 8, 64), (71, 1, 64)
RAGGED = torch.randint(100, 4096, (64,), generator=torch.Generator().manual_seed(0)).tolist()


@frozen(kw_only=True)
class Case:
    """Sequences of these lengths, of which one token each (decode) or all tokens (prefill) are new."""

    name: str
    heads: tuple[int, int, int]
    lens: list[int]
    prefill: bool = False
    page: int = 64

    def work(self, kv_bytes: int) -> float:
        """Return bytes to read, or operations to do."""
        num_heads, num_kv_heads, head = self.heads
        if self.prefill:
            return sum(2.0 * num_heads * head * n * n for n in self.lens)
        return float(sum(self.lens) * num_kv_heads * head * 2 * kv_bytes)


CASES = [
    Case(name="decode 64 x 2k", heads=LLAMA_70B, lens=[2048] * 64),
    Case(name="decode 64 x 8k", heads=LLAMA_70B, lens=[8192] * 64),
    Case(name="decode 64 x 100..4096", heads=LLAMA_70B, lens=RAGGED),
    Case(name="decode 1 x 131k", heads=LLAMA_70B, lens=[131072]),
    Case(name="decode 1 x 1k, few bytes", heads=LLAMA_8B, lens=[1024]),
    Case(name="decode 256 x 1k", heads=LLAMA_8B, lens=[1024] * 256),
    Case(name="decode 64 x 2k, Falcon", heads=FALCON_180B, lens=[2048] * 64),
    Case(name="decode 64 x 2k, MQA 71, few bytes", heads=FALCON_7B, lens=[2048] * 64),
    Case(name="prefill 1 x 8k", heads=LLAMA_70B, lens=[8192], prefill=True),
    Case(name="prefill 4 x 2k", heads=LLAMA_70B, lens=[2048] * 4, prefill=True),
    Case(name="prefill 1 x 8k, pages of 128", heads=LLAMA_70B, lens=[8192], prefill=True, page=128),
    Case(name="prefill 1 x 4k, Falcon", heads=FALCON_180B, lens=[4096], prefill=True),
]


@frozen(kw_only=True)
class Row:
    """One case measured; `rate` in TB/s or TFLOP/s."""

    name: str
    kv: str
    microseconds: float
    rate: float
    roof: float


def main() -> None:
    """Measure every case in both KV types and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(case, kv) for case, kv in itertools.product(CASES, DTYPES)]
    for row in rows:
        print(f"{row.name:36} {row.kv:9} {row.microseconds:9.1f} us {row.rate:8.2f} {row.roof:6.1%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


@torch.inference_mode()
def measure(case: Case, kv_name: str) -> Row:
    """Return a case's row."""
    num_heads, num_kv_heads, head = case.heads
    inputs, kv = laid_out(case, DTYPES[kv_name])
    backend = create(AttentionNeeds(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head), CUDA)
    inputs = evolve(inputs, prepared=backend.prepare(inputs))
    q_THD = torch.randn(sum(case.lens) if case.prefill else len(case.lens), num_heads, head, device=CUDA).bfloat16()
    one = torch.ones((), device=CUDA)
    params = AttentionParams(scale=head**-0.5, k_scale=one, v_scale=one)
    seconds = replayed(lambda: backend.attend(q_THD, kv, inputs, params), calls=4 if case.prefill else 10)
    rate = case.work(DTYPES[kv_name].itemsize) / seconds
    roof = FLOPS_ROOF if case.prefill else BYTES_ROOF
    return Row(name=case.name, kv=kv_name, microseconds=seconds * 1e6, rate=rate / 1e12, roof=rate / roof)


def laid_out(case: Case, dtype: torch.dtype) -> tuple[AttentionInputs, LayerKV]:
    """Return a step's inputs and random pages in shuffled order."""
    news = case.lens if case.prefill else [1] * len(case.lens)
    counts = [-(-length // case.page) for length in case.lens]
    pages = torch.split_with_sizes(torch.randperm(sum(counts), dtype=torch.int32), counts)
    tables_SM = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)
    shape = (sum(counts), case.page, *case.heads[1:])
    kv = LayerKV(*(torch.randn(shape, device=CUDA, dtype=torch.bfloat16).to(dtype) for _ in range(2)))
    starts = torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32, device=CUDA)
    inputs = AttentionInputs(
        positions_T=starts,  # attention reads neither positions nor slots
        slots_T=starts,
        query_start_S1=starts,
        seq_lens_S=torch.tensor(case.lens, dtype=torch.int32, device=CUDA),
        block_tables_SM=tables_SM.to(CUDA),
        page_size=case.page,
        num_decodes=0 if case.prefill else len(case.lens),
        max_query_len=max(news),
        max_seq_len=max(case.lens),
    )
    return inputs, kv


def replayed(call: Callable[[], object], *, calls: int, times: int = 9) -> float:
    """Return the median seconds of a call, some of them captured as one graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    found: list[float] = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / calls / 1e3)
    return statistics.median(found)


if __name__ == "__main__":
    main()
