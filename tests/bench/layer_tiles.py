"""Tiles of products and of decode attention, timed among a layer's other kernels: python -m tests.bench.layer_tiles MODEL.

A tile that is quicker alone need not be among neighbours, whose programs leave it registers and shared memory or do not. So the
layers of `layer_stack` are captured whole, once with what is served and again with each other tile, of FP8 products, of INT4
products, of 16-bit ones by the FP8 kernel's ring, or of attention over FP8 pages, whichever the model has; what is served is
timed first and last, which shows how clocks drift. MODEL is a folder with config.json, for INT4 with `--int4-compute w4a8`; needs
a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
import torch
from attrs import evolve
from torch import Tensor

from paddock.planning import rebuild
from paddock.plugins import resolve
from paddock_triton import attention, ops_linear, ops_linear_fp8_ring, ops_linear_int4
from paddock_triton.ring import ALL_REGISTERS
from tests.bench.decode_variants import KEYS_64
from tests.bench.layer_stack import CUDA, Stack, stack_of

Patch = Callable[[pytest.MonkeyPatch], None]


def _ring(tokens: int, **changes: Any) -> Patch:
    def put(patch: pytest.MonkeyPatch) -> None:
        patch.setitem(ops_linear_fp8_ring.TILES, tokens, evolve(ops_linear_fp8_ring.TILES[tokens], **changes))

    return put


def _int4(tokens: int, **changes: Any) -> Patch:
    def put(patch: pytest.MonkeyPatch) -> None:
        for tiles in (ops_linear_int4._FP8, ops_linear_int4._FP8_DEEP):
            patch.setitem(tiles, tokens, evolve(tiles[tokens], **changes))

    return put


def _attention(**changes: Any) -> Patch:
    return lambda patch: patch.setattr(attention, "decode_tile", lambda _q, _kv: evolve(KEYS_64, **changes))


def _plain_ring() -> Patch:
    served = ops_linear.linear

    def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        if not 0 < len(x_TI) <= max(ops_linear_fp8_ring.TILES) or weight_OI.stride(0) % 8:
            return served(x_TI, weight_OI)
        out_TO = x_TI.new_empty(len(x_TI), len(weight_OI))
        ops_linear_fp8_ring.launch_ring_plain(out_TO, x_TI, weight_OI, ops_linear_fp8_ring.tile_for(len(x_TI), weight_OI))
        return out_TO

    return lambda patch: patch.setattr(ops_linear, "linear", linear)


def candidates(stack: Stack, rows: int) -> Iterator[tuple[str, Patch]]:
    """Yield a name and what it changes, for so many tokens: what is served first and last."""
    served: tuple[str, Patch] = ("served", lambda patch: None)
    yield served
    tokens = next(most for most in ops_linear_fp8_ring.TILES if rows <= most)
    if stack.plan.quantization is None:
        yield "products by the ring", _plain_ring()
    elif stack.plan.fp8_inputs_from is None:
        other = ops_linear_fp8_ring._SPARING if ops_linear_fp8_ring.TILES[tokens].registers == ALL_REGISTERS else ALL_REGISTERS
        changes = ({"turns": 1}, {"registers": other}, {"turns": 1, "registers": other}, {"turns": 1, "slots": 5})
        yield from ((f"ring {each}", _ring(tokens, **each)) for each in changes)
    elif tokens in ops_linear_int4._FP8_DEEP:
        yield from ((f"int4 {each}", _int4(tokens, **each)) for each in ({"turns": 1}, {"slots": 4}, {"turns": 1, "slots": 4}))
    needs = rebuild.attention_needs(stack.plan)
    group = needs.num_heads // needs.num_kv_heads
    if stack.plan.kv_cache_dtype == "fp8" and group <= 32:
        size = {"block_m": next(most for most in (8, 16, 32) if group <= most)}
        yield from ((f"attention {each}", _attention(**size, **each)) for each in ({}, {"stages": 4}, {"warps": 2}))
    yield served


@click.command()
@click.argument("model")
@click.option("--rows", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--context", type=int, default=192, show_default=True)
@click.option("--layers", type=int, help="So many of the model's layers alone.")
@click.option("--int4-compute", default="auto", show_default=True)
def main(model: str, rows: int, context: int, layers: int | None, int4_compute: str) -> None:
    """Print microseconds a layer with each tile, as JSON."""
    stack = stack_of(model, rows, context, layers, kv_cache_dtype="fp8", int4_compute=int4_compute)
    with torch.inference_mode():
        for name, put in candidates(stack, rows):
            with pytest.MonkeyPatch.context() as patch:
                put(patch)
                backend = resolve(stack.plan.attention.factory)(rebuild.attention_needs(stack.plan), CUDA)
                spent = stack.microseconds(stack.plan, backend) / stack.plan.num_layers
            click.echo(json.dumps({"tile": name, "microseconds_a_layer": round(spent, 2)}))


if __name__ == "__main__":
    main()
