"""Tiles and schedules for an H200, and the measurements that chose them: percent of 4.3 TB/s, or TFLOP/s, in CUDA graphs.

Decode, 64 sequences, 64 heads on 8, D 128, pages of 64, 2k / 8k keys, a tile of 64 keys:
  bfloat16: 4 warps, 4 stages, copy engine 98 / 102 % (2 warps the same); 3 stages 89 / 87 %; 5 93 / 94 %; 32 keys 77 / 79 %.
  FP8 in pairs: 4 warps, 3 stages, copy engine 92 / 97 %; 2 warps, 4 stages, pointers 91 / 96 %; 6 stages 78 / 84 %.
    One H200, cuts in turn, three times over (`python -m tests.bench.decode_variants --repeat 3`), of 8k: 4 warps, 3 stages 93 %,
    4 stages 91; 2 warps, 4 stages, pointers 92; of 2k: 88 to 90, 84 to 87, 87. In a run of one pass, of 8k: 89 to 91, 94.5, 95;
    5 stages 87, 8 warps 66; two tiles of keys at a time (14 barriers instead of 20) 88 to 92.5, so left out (commit 2a1a69c).
    Warps that take keys of their own, 8 rows (3 barriers a tile of 64 keys in what is compiled, not 10, 16 products, not 32, 121
    registers, not 127), beside what is served: 8k 90 to 92 %, 92 to 93; 2k 84, 87 to 88; one of 131k 75 to 77, 79 to 80; G 29,
    D 64 44, 68 to 69; so left out (commit 984ba6c).
    All tiles masked alike, by pointers, in 4 stages, for the copy engine and a last tile apart (microseconds of a layer of 8B
    in FP8 among its products, 8 of its layers; `python -m tests.bench.layer_tiles` has the first, in 3 stages, and the last
    tile apart; the others came of a script that is not kept): one sequence of 230, 380, 1,000, 2,040 keys 66.3, 66.6, 67.1,
    68.8 for 69.1, 69.9, 67.7, 70.6; 16 of 500 76.1, 76.3; 64 of 230 and 2,040 87.8, 150.7 for 89.8, 152.5. In 3 stages 67.3,
    66.9, 67.4, 69.7; 75.8; 86.7, 149.8. Masked as the copy engine brings them 67.0 to 70.1, 157.2 for 64 of 2,040. Of bfloat16
    no gain: 118.7 for 118.4, 265.6 for 265.6. Alone, on one more card (`python -m tests.bench.decode_variants --only served`):
    64 of 8k 93 %, of 2k 86, one of 131k 77.
  FP8 byte by byte: 84 / 51 % at best. Pages of 128 with 128 keys: bfloat16 98 / 100 %, FP8 88 / 91 %. Pages of 16: 83 %.
  G 29, D 64, 2k: bfloat16 64 rows 79 %, 32 rows 74 %; FP8 32 rows, 2 warps 62 %, with
  the copy engine 70 %, 4 warps 38 %. D 256, 4k: 32 keys 98 %.
Programs a multiprocessor (1, 2, 4, 8), bfloat16: one sequence of 131k 98, 94, 88, 78 %; 8 of 8k 91, 91, 84, 80 %; 64 of 100 to
  4096 (2, 4, 8) 80, 84, 87 %; 64 of 2k (4, 8) 98, 92 %. FP8: one of 131k 54, 81, 84, 72 %; 8 of 8k 52, 77, 78, 69 %.
Prefill by `attention_prefill`, one sequence of 8k, 64 heads on 8, D 128, which is now served by `attention_async`:
  bfloat16: 64 x 64, 4 warps, 3 stages, copy engine 523 (4 stages 342, 8 warps 327, pointers 468); 128 x 64, 8 warps 465;
  pages of 128: 128 x 128, 8 warps 531, but 394 against 421 for 4 sequences of 2k; 64 x 64 521, in another run 469.
  FP8: 256 x 64, 8 warps, 3 stages 365; 64 x 64 308; 128 x 128 333. D 64, 4k: 411. D 256, 4k: 128 x 64, 8 warps 497; 64 x 64 344.
Prefill in FP8 arithmetic, multiplied in float16, has not been timed; its tiles were chosen for products of e4m3 (decision 69).
Not taken: torch's cuDNN attention on gathered pages, 646, for it plans 39 to 510 ms at each new length.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from paddock.layers import LayerKV
from paddock.layers.reference import FP8
from paddock_triton.attention_tile import Tile

_CPU_PROCESSORS = 8  # the interpreter runs one program after the other; enough that sequences are split


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors are to be kept busy."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _CPU_PROCESSORS


def decode_programs(num_processors: int, *, whole: int, fp8: bool) -> int:
    """Return how many programs the pieces of a decode should make, where `whole` sequences and heads would make that many."""
    return num_processors * (4 if fp8 or whole > 2 * num_processors else 2)


def decode_tile(q_THD: Tensor, kv: LayerKV) -> Tile:
    """Return the tile for decodes: all query heads of a KV head in few rows, which hold the tensor core's least."""
    _, _, num_kv_heads, head = kv.k_pages_NPKD.shape
    small, fp8 = q_THD.shape[1] // num_kv_heads <= 16, kv.k_pages_NPKD.dtype == FP8
    if head > 128:
        return Tile(block_m=16 if small else 32, block_n=32, warps=4, stages=3, tma=True, pairs=True)
    if fp8 and small:
        return Tile(block_m=16, block_n=64, warps=4, stages=4, pairs=True, masked=True)
    if fp8:
        return Tile(block_m=32, block_n=64, warps=2, stages=4, tma=head <= 64, pairs=True)  # of wider heads not timed
    return Tile(block_m=16 if small else 64, block_n=64, warps=4, stages=4, tma=True)


def prefill_tile(q_THD: Tensor, kv: LayerKV, *, in_fp8: bool = False) -> Tile:
    """Return the tile for prefills."""
    _, _, _, head = kv.k_pages_NPKD.shape
    if in_fp8:
        return Tile(block_m=64 if head > 128 else 128, block_n=64, warps=8, stages=2 if head > 128 else 3, tma=True)
    if head > 128:
        return Tile(block_m=128, block_n=64, warps=8, stages=2, tma=True)
    if head > 64 and kv.k_pages_NPKD.dtype == FP8:
        return Tile(block_m=256, block_n=64, warps=8, stages=3, tma=True)
    return Tile(block_m=64, block_n=64, warps=4, stages=3, tma=True)
