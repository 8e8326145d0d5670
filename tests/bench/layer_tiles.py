"""Tiles of products and of decode attention, timed among a layer's other kernels: python -m tests.bench.layer_tiles MODEL.

A tile that is quicker alone need not be among neighbours, whose programs leave it registers and shared memory or do not. So the
layers of `layer_stack` are captured whole, once with what is served and again with each other tile, of FP8 or 16-bit products by
the ring, of 16-bit ones in blocks, of INT4 products, or of attention over FP8 pages, whichever the model has; what is served is
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

from paddock.planning import rebuild
from paddock.plugins import resolve
from paddock_triton import attention, attention_tuning, linear_ring, ops_linear, ops_linear_int4
from paddock_triton.ring import ALL_REGISTERS
from tests.bench.layer_stack import CUDA, Stack, stack_of

Patch = Callable[[pytest.MonkeyPatch], None]


def _ring(tokens: int, **changes: Any) -> Patch:
    def put(patch: pytest.MonkeyPatch) -> None:
        patch.setitem(linear_ring.TILES, tokens, evolve(linear_ring.TILES[tokens], **changes))

    return put


def _deep(tokens: int, **changes: Any) -> Patch:
    def put(patch: pytest.MonkeyPatch) -> None:
        tiles = ops_linear_int4._FP8_DEEP
        patch.setitem(tiles, tokens, evolve(tiles[tokens], **changes))

    return put


def _attention(**changes: Any) -> Patch:
    served = attention_tuning.decode_tile
    return lambda patch: patch.setattr(attention, "decode_tile", lambda q_THD, kv: evolve(served(q_THD, kv), **changes))


def _in_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops_linear, "serves", lambda x_TI, weight_OI: False)


def candidates(stack: Stack, rows: int) -> Iterator[tuple[str, Patch]]:
    """Yield a name and what it changes, for so many tokens: what is served first and last."""
    served: tuple[str, Patch] = ("served", lambda patch: None)
    yield served
    tokens = next(most for most in linear_ring.TILES if rows <= most)
    if stack.plan.quantization is None and rows > 1:
        yield "products in blocks", _in_blocks
    if stack.plan.fp8_inputs_from is None and (stack.plan.quantization is not None or rows > 1):
        other = linear_ring._SPARING if linear_ring.TILES[tokens].registers == ALL_REGISTERS else ALL_REGISTERS
        fewer = linear_ring.TILES[tokens].slots - 1
        yield from ((f"ring {each}", _ring(tokens, **each)) for each in ({"registers": other}, {"slots": fewer}))
    elif tokens in ops_linear_int4._FP8_DEEP and stack.plan.fp8_inputs_from is not None:
        yield from ((f"int4 {each}", _deep(tokens, **each)) for each in ({"slots": 2}, {"slots": 3}))
    if stack.plan.kv_cache_dtype == "fp8":
        last_apart = {"masked": False, "tma": True, "stages": 3}
        yield from ((f"attention {each}", _attention(**each)) for each in ({"stages": 3}, last_apart))
    yield served


@click.command()
@click.argument("model")
@click.option("--rows", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--context", type=int, default=230, show_default=True)
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
