"""From logits to tokens: the most likely one, or one drawn by Gumbel's trick with the noise that `execution.randomness` defines.

R rows, V vocabulary; B tokens of a block; C chunks of a row, each a program's. Logits may be of any float dtype. A candidate is
one int64 that compares as (logit, lower token first), NaN above all: chunks of a row are joined by its maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.launch import launch
from paddock_triton.rows import blocks_of, pieces_of, power_of_2, unit_stride

_BLOCK, _WARPS = 2048, 8
# Programs to spread few rows over: eight a multiprocessor of an H200 fill it. With two, 1, 64 and 256 rows of 128,256 took
# 2.5, 19 and 63 us (torch's max 26, 39 and 49), a draw 4.3, 37 and 126.
_PROGRAMS = 1056
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """Return `randomness.mix` of uint32."""
    x ^= x >> 16
    x = (x.to(tl.uint64) * 0x7FEB352D).to(tl.uint32)
    x ^= x >> 15
    x = (x.to(tl.uint64) * 0x846CA68B).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _bits(low: tl.tensor, high: tl.tensor, position: tl.tensor, token_B: tl.tensor) -> tl.tensor:
    """Return `randomness.noise_bits` [B] as uint32 for a row's seed words and output position, all uint32."""
    a = _mix((position.to(tl.uint64) * 0x9E3779B9 + low.to(tl.uint64)).to(tl.uint32))
    b = _mix(high ^ a)
    x_B = (token_B.to(tl.uint64) * 0x9E3779B1 + a.to(tl.uint64)).to(tl.uint32)
    x_B ^= x_B >> 16
    x_B = (x_B.to(tl.uint64) * 0x7FEB352D).to(tl.uint32) ^ b
    x_B ^= x_B >> 15
    x_B = (x_B.to(tl.uint64) * 0x846CA68B).to(tl.uint32)
    return x_B ^ (x_B >> 16)


@triton.jit
def _gumbel(bits_B: tl.tensor) -> tl.tensor:
    """Return `randomness.gumbel` of bits: -log(-log1p(-u)), log1p by what 1 - u rounds off."""
    u_B = tl.minimum((bits_B >> 1).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10, 0.99999994039535522)
    w_B = 1.0 - u_B
    rest_B = (1.0 - w_B) - u_B
    return -tl.log(-(tl.log(w_B) + rest_B * (1.0 + u_B)))


@triton.jit
def rank_of(x_B: tl.tensor) -> tl.tensor:
    """Return int32 that compare as the float32 do: -0 and 0 the same, NaN above infinity."""
    bits_B = (x_B + 0.0).to(tl.int32, bitcast=True)
    above_B = tl.zeros_like(bits_B) + _LAST
    return tl.where(x_B != x_B, above_B, tl.where(bits_B < 0, bits_B ^ _LAST, bits_B))


@triton.jit(  # parameters of rows are slices: where they begin, as the number of rows and of chunks, is no part of a kernel
    do_not_specialize=["seed_stride", "word_stride", "chunks"],
    do_not_specialize_on_alignment=["top_ptr", "temperature_ptr", "least_ptr", "seed_ptr", "position_ptr"],
)
def _race_kernel(
    logits_ptr: tl.tensor, top_ptr: tl.tensor, temperature_ptr: tl.tensor, least_ptr: tl.tensor, seed_ptr: tl.tensor,
    position_ptr: tl.tensor, best_ptr: tl.tensor, stride: tl.tensor, seed_stride: tl.tensor, word_stride: tl.tensor,
    chunks: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write the best candidate of a chunk of a row: by logit, or by (logit - top) / temperature + noise if there is a seed.

    Scaled logits under `least` stay out of the race. A row of temperature 0 has none.
    """
    start_next()
    wait()
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    if seed_ptr is not None:  # noqa: SIM102, both sides of an `and` are compiled
        if tl.load(temperature_ptr + row) == 0:
            return
    lane_B = tl.arange(0, BLOCK)
    lowest_B = tl.full([BLOCK], -0x80000000, tl.int32)
    rank_B, token_B = lowest_B, lane_B
    for start in range(0, VOCAB, chunks * BLOCK):
        at_B = start + chunk * BLOCK + lane_B
        x_B = tl.load(logits_ptr + row * stride + at_B, mask=at_B < VOCAB, other=-float("inf")).to(tl.float32)
        if seed_ptr is not None:
            low = tl.load(seed_ptr + row * seed_stride).to(tl.uint32, bitcast=True)
            high = tl.load(seed_ptr + row * seed_stride + word_stride).to(tl.uint32, bitcast=True)
            position = tl.load(position_ptr + row).to(tl.uint32, bitcast=True)
            x_B = tl.div_rn(x_B - tl.load(top_ptr + row), tl.zeros_like(x_B) + tl.load(temperature_ptr + row))
            if least_ptr is not None:
                x_B = tl.where(x_B >= tl.load(least_ptr + row), x_B, -float("inf"))
            x_B += _gumbel(_bits(low, high, position, at_B))
        found_B = tl.where(at_B < VOCAB, rank_of(x_B), lowest_B)
        token_B = tl.where(found_B > rank_B, at_B, token_B)
        rank_B = tl.maximum(found_B, rank_B)
    tl.store(best_ptr + tl.program_id(0), tl.max((rank_B.to(tl.int64) << 32) | (token_B ^ _LAST).to(tl.int64)))


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["kept_ptr", "temperature_ptr"])
def _finish_kernel(
    best_ptr: tl.tensor, top_ptr: tl.tensor, kept_ptr: tl.tensor, temperature_ptr: tl.tensor, token_ptr: tl.tensor,
    chunks: tl.tensor, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Write a row's winner: its token and, where wanted, what it won with. A row of temperature 0 keeps its token."""
    start_next()
    wait()
    row, lane = tl.program_id(0), tl.arange(0, LANES)
    best = tl.max(tl.load(best_ptr + row * chunks + lane, mask=lane < chunks, other=-0x7FFFFFFFFFFFFFFF))
    token = (best & 0xFFFFFFFF) ^ _LAST
    if kept_ptr is not None:
        token = tl.where(tl.load(temperature_ptr + row) == 0, tl.load(kept_ptr + row), token)
    tl.store(token_ptr + row, token)
    if top_ptr is not None:
        rank = (best >> 32).to(tl.int32)
        tl.store(top_ptr + row, tl.where(rank < 0, rank ^ _LAST, rank).to(tl.float32, bitcast=True))


@named("most_likely")
def most_likely(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit [R] as float32, NaN if it holds one, and the first token that has it [R], int64."""
    top_R = torch.empty(len(logits_RV), dtype=torch.float32, device=logits_RV.device)
    return top_R, race(logits_RV, won_R=top_R)


@named("draw")
def draw(logits_RV: Tensor, top_R: Tensor, token_R: Tensor, temperature_R: Tensor, seed_R2: Tensor, position_R: Tensor) -> Tensor:
    """Return a token [R] of each row's softmax at its temperature; a row of temperature 0 keeps its `token_R`."""
    return race(
        logits_RV, top_R=top_R, kept_R=token_R, temperature_R=temperature_R.contiguous(), seed_R2=seed_R2, position_R=position_R
    )


def race(
    logits_RV: Tensor,
    *,
    won_R: Tensor | None = None,
    top_R: Tensor | None = None,
    kept_R: Tensor | None = None,
    temperature_R: Tensor | None = None,
    least_R: Tensor | None = None,
    seed_R2: Tensor | None = None,
    position_R: Tensor | None = None,
) -> Tensor:
    """Return each row's winner [R]: by logit, what it won with in `won_R`, or given the others drawn as `draw` says.

    Tokens whose scaled logit is under `least_R` are not drawn. All [R] lie dense.
    """
    logits_RV = unit_stride(logits_RV)
    rows, vocab = logits_RV.shape
    token_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    if rows:
        blocks = blocks_of(vocab, _BLOCK)
        chunks = pieces_of(blocks, _PROGRAMS // rows)
        best_RC = torch.empty((rows, chunks), dtype=torch.int64, device=logits_RV.device)
        seed_strides = (0, 0) if seed_R2 is None else seed_R2.stride()
        launch(
            _race_kernel, (rows * chunks,),
            logits_RV, top_R, temperature_R, least_R, seed_R2, position_R, best_RC, logits_RV.stride(0), *seed_strides,
            chunks, VOCAB=vocab, BLOCK=_BLOCK, num_warps=_WARPS, **DEPENDENT,
        )  # fmt: skip
        launch(
            _finish_kernel, (rows,), best_RC, won_R, kept_R, temperature_R, token_R, chunks, LANES=power_of_2(blocks),
            num_warps=1, **DEPENDENT,
        )  # fmt: skip
    return token_R
