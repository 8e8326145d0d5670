"""Time of every fused op beside its twin and torch's own: python plugins/triton/bench/ops.py [--json FILE] [--tokens 1,4096].

A time is a CUDA graph's of several calls on as many sets of random inputs and outputs, at least 256 MB in all (the L2 holds 50),
over the number of calls: what an op costs inside a captured step. Bytes are what the op must read and write, once. `host` is
what a call costs the Python thread outside of graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
import triton
from attrs import frozen
from torch import Tensor

from paddock.execution import randomness
from paddock.execution.sampler import most_likely
from paddock.layers import LayerKV, reference
from paddock.plugins import resolve
from paddock_triton.plugin import paddock_ops

ROOF = 4.3e12  # bytes a second, a device-to-device copy's on an H200
MIN_SPAN = 256e6
CUDA = torch.device("cuda")
MODELS = {  # name: embed, feed-forward, (H, K, D)
    "8b": (4096, 14336, (32, 8, 128)),
    "70b": (8192, 28672, (64, 8, 128)),
    "405b": (16384, 53248, (128, 8, 128)),
    "falcon-180b": (14848, 59392, (232, 8, 64)),
}
VOCAB = 128_256
SAMPLING = {"most_likely": "paddock_triton.ops_sampling:most_likely", "draw": "paddock_triton.ops_sampling:draw"}
LIBRARY: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x_TE, weight_E, eps: nnf.rms_norm(x_TE, weight_E.shape, weight_E, eps),
    "add_rms_norm": lambda x_TE, delta_TE, weight_E, eps: nnf.rms_norm(x_TE + delta_TE, weight_E.shape, weight_E, eps),
    "layer_norm": lambda x_TE, weight_E, bias_E, eps: nnf.layer_norm(x_TE, weight_E.shape, weight_E, bias_E, eps),
    "gelu": nnf.gelu,
    "most_likely": lambda logits_RV: logits_RV.max(dim=-1),
}


@frozen(eq=False)
class Case:
    """One op at one size: `make(seed)` gives arguments; `nbytes` what a call must move."""

    op: str
    size: str
    make: Callable[[int], tuple[Any, ...]]
    nbytes: int


def cases(tokens: int, model: str) -> list[Case]:
    """Return every op at the widths of a model, in bf16."""
    embed, feed, heads = MODELS[model]
    weight_E, scale = _x(0, 1, embed)[0], torch.tensor(0.01, device=CUDA)

    def rows(*rest: Any, width: int = embed, count: int = 1) -> Callable[[int], tuple[Any, ...]]:
        return lambda seed: (*(_x(2 * seed + i, tokens, width) for i in range(count)), *rest)

    row, layer = tokens * embed, (weight_E, weight_E, 1e-5)
    return [
        Case("rms_norm", model, rows(weight_E, 1e-5), 4 * row),
        Case("add_rms_norm", model, rows(weight_E, 1e-5, count=2), 8 * row),
        Case("layer_norm", model, rows(*layer), 4 * row),
        Case("add_layer_norm", model, rows(*layer, count=2), 8 * row),
        Case("silu_mul", model, rows(width=2 * feed), 6 * tokens * feed),
        Case("gelu", model, rows(width=feed), 4 * tokens * feed),
        Case("quantize_fp8_token", model, rows(), 3 * row),
        Case("quantize_fp8_static", model, rows(scale), 3 * row),
        *_cache_cases(tokens, model, *heads),
    ]


def sampling_cases(rows: int) -> list[Case]:
    """Return what chooses a token of each row of logits."""

    def make(seed: int) -> tuple[Any, ...]:
        logits_RV = _x(seed, rows, VOCAB).float()
        seed_R2 = torch.randint(-(2**31), 2**31, (rows, 2), device=CUDA, dtype=torch.int32)
        return logits_RV, logits_RV.amax(-1), torch.full((rows,), 0.8, device=CUDA), seed_R2, seed_R2[:, 0].contiguous()

    nbytes = 4 * rows * VOCAB
    return [Case("most_likely", "128256", lambda seed: make(seed)[:1], nbytes), Case("draw", "128256", make, nbytes)]


def _drawn(logits_RV: Tensor, top_R: Tensor, temperature_R: Tensor, seed_R2: Tensor, position_R: Tensor) -> Tensor:
    scaled_RV = (logits_RV - top_R[:, None]).div_(temperature_R[:, None])
    terms_V = torch.arange(VOCAB, dtype=torch.int32, device=CUDA)  # any: only the time counts here
    return most_likely(randomness.gumbel(randomness.noise_bits(seed_R2, position_R, terms_V)).add_(scaled_RV))[1]


def _cache_cases(tokens: int, model: str, heads: int, kv_heads: int, size: int) -> Iterator[Case]:
    for name, page_dtype, stored in (("", torch.bfloat16, 2), (" fp8", torch.float8_e4m3fn, 1)):
        kv_bytes = 2 * (2 + stored) * tokens * kv_heads * size
        make = _cache_maker(tokens, heads, kv_heads, size, page_dtype)
        yield Case("rope_and_cache", model + name, make, 4 * tokens * heads * size + kv_bytes)
        yield Case("cache_kv", model + name, _without_rotation(make), kv_bytes)


def _without_rotation(make: Callable[[int], tuple[Any, ...]]) -> Callable[[int], tuple[Any, ...]]:
    def made(seed: int) -> tuple[Any, ...]:
        _, k_TKD, v_TKD, _, _, *rest = make(seed)
        return k_TKD, v_TKD, *rest

    return made


def _cache_maker(tokens: int, heads: int, kv_heads: int, size: int, page_dtype: torch.dtype) -> Callable[[int], tuple[Any, ...]]:
    def make(seed: int) -> tuple[Any, ...]:
        parts = _x(seed, tokens, (heads + 2 * kv_heads) * size).split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
        q_THD, k_TKD, v_TKD = (part.view(tokens, part.shape[1] // size, size) for part in parts)
        pages = [torch.zeros(tokens // 16 + 1, 16, kv_heads, size, device=CUDA, dtype=page_dtype) for _ in range(2)]
        table_LD = torch.randn(8192, size, device=CUDA)
        positions_T = torch.arange(tokens, device=CUDA)
        scales = (torch.tensor(0.5, device=CUDA), torch.tensor(0.25, device=CUDA))
        return q_THD, k_TKD, v_TKD, table_LD, positions_T, LayerKV(*pages), torch.randperm(tokens, device=CUDA), *scales

    return make


def _x(seed: int, tokens: int, width: int) -> Tensor:
    generator = torch.Generator(device=CUDA).manual_seed(seed)
    return torch.randn(tokens, width, device=CUDA, generator=generator).bfloat16()


def inputs(case: Case) -> list[tuple[Any, ...]]:
    """Return enough sets of arguments that no call finds its own in the L2; for small cases, as many as a step has layers."""
    return [case.make(seed) for seed in range(1, 1 + max(4, min(32, int(MIN_SPAN / case.nbytes) + 1)))]


def seconds(call: Callable[..., Any], sets: list[tuple[Any, ...]], *, rounds: int = 15) -> float:
    """Return the seconds of one call inside a captured graph, the median of several replays."""
    for _ in range(2):
        call(*sets[0])
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept += [call(*arguments) for arguments in sets]
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(sets))
    return statistics.median(times[3:])


def host_seconds(call: Callable[..., Any], arguments: tuple[Any, ...], *, calls: int = 300) -> float:
    """Return what a call costs the calling thread, the launch queue never full."""
    spans = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(*arguments)
        spans.append((time.perf_counter() - start) / calls)
    return min(spans)


def measure(case: Case) -> dict[str, Any]:
    """Return the figures of one case."""
    call = resolve({**{spec.op: spec.implementation for spec in paddock_ops()}, **SAMPLING}[case.op])
    twin = {"most_likely": most_likely, "draw": _drawn}.get(case.op) or getattr(reference, case.op)
    sets = inputs(case)
    taken = seconds(call, sets)
    library = LIBRARY.get(case.op)
    return {
        "op": case.op,
        "size": case.size,
        "us": taken * 1e6,
        "tb_s": case.nbytes / taken / 1e12,
        "percent_of_roof": 100 * case.nbytes / taken / ROOF,
        "twin_us": seconds(twin, sets) * 1e6,
        "library_us": None if library is None else seconds(library, sets) * 1e6,
        "host_us": host_seconds(call, sets[0]) * 1e6,
    }


def main() -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default="1,64,4096")
    parser.add_argument("--models", default="8b,70b,falcon-180b")
    options = parser.parse_args()
    rows, gpu = [], f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{gpu}, bf16, roof {ROOF / 1e12} TB/s")
    print(f"tokens {'op':20} {'size':16} {'us':>8}   TB/s % roof  twin us torch us host us")
    for tokens in map(int, options.tokens.split(",")):
        for case in (
            *sampling_cases(min(tokens, 256)),
            *(c for model in options.models.split(",") for c in cases(tokens, model)),
        ):
            row = {"tokens": tokens, **measure(case)}
            rows.append(row)
            library = f"{row['library_us']:8.1f}" if row["library_us"] else f"{'-':>8}"
            figures = f"{row['us']:8.2f} {row['tb_s']:6.2f} {row['percent_of_roof']:6.1f} {row['twin_us']:8.1f} {library}"
            print(f"{tokens:6} {case.op:20} {case.size:16} {figures} {row['host_us']:7.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"gpu": gpu, "dtype": "bfloat16", "roof": ROOF, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
