"""The sizes at which FP8 products, the producers of FP8, and products that end in one are measured.

T tokens, E model size, I, O input and output features, F feed-forward size, G groups of inputs, Q runs of outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from paddock.bench.kernels.case import Case, Draw, Make
from paddock.layers.reference import FP8, FP8_MAX
from paddock.planning.roofs import FP8 as FP8_PRODUCTS
from paddock.planning.roofs import NO_TENSOR_CORES

_EPS, _SCALE, _BOUND = 1e-5, 0.01, 1200.0
_DEVIATION = 100.0  # of stored values: most of FP8's range is used
_WEIGHT_SCALE = 1e-4
_FLOAT32_BYTES = 4
BLOCK = 128  # outputs, and inputs, to a scale of blocks, as every published checkpoint has them
PRODUCTS = ("linear_fp8", "linear_fp8_fast", "linear_fp8_blocks")
GATED = ("linear_silu_mul_fp8", "linear_silu_mul_fp8_fast")
_SCALINGS = (("static", _SCALE, None), ("a scale a token", None, None), (f"a scale a token and {BLOCK}", None, BLOCK))
# Op: how many activations it takes, how many features it reads for one it writes, and whether as wide as the feed-forward.
PRODUCERS = {
    "rms_norm_fp8": (2, 1, False),
    "layer_norm_fp8": (2, 1, False),
    "silu_mul_fp8": (1, 2, True),
    "gelu_fp8": (1, 1, True),
}


@frozen(kw_only=True)
class Fp8Size:
    """A model's: its name, embed, feed-forward, and the linears (O, I) of its layers."""

    name: str
    embed: int
    feed: int
    linears: tuple[tuple[int, int], ...]


@frozen(eq=False, kw_only=True)
class Fp8Cases:
    """Makes the cases of FP8 products and of the ops whose names end in `_fp8`."""

    sizes: tuple[Fp8Size, ...]
    tokens: tuple[int, ...]
    product_tokens: tuple[int, ...]
    gated_tokens: tuple[int, ...]
    draw: Draw

    def of(self, op: str) -> list[Case]:
        """Return the cases of an op, none for one that is not of these."""
        if op in PRODUCTS:
            return list(self._products(op))
        if op in GATED:
            return list(self._gated())
        return list(self._rows(op)) if op in PRODUCERS else []

    def _products(self, op: str) -> Iterator[Case]:
        blocks = op == "linear_fp8_blocks"
        for size in self.sizes:
            for (rows, columns), tokens in ((shape, t) for shape in size.linears for t in self.product_tokens):
                groups, runs = (-(-columns // BLOCK), -(-rows // BLOCK)) if blocks else (1, rows)
                nbytes = rows * columns + tokens * (columns + self._item * rows) + _FLOAT32_BYTES * groups * (tokens + runs)
                yield Case(
                    name=f"{size.name} {tokens} x {columns} -> {rows}",
                    make=self._product(rows, columns, tokens, blocks=blocks),
                    nbytes=nbytes,
                    flops=2.0 * tokens * rows * columns,
                    kind=FP8_PRODUCTS,
                )

    def _product(self, rows: int, columns: int, tokens: int, *, blocks: bool) -> Make:
        groups, runs = (-(-columns // BLOCK), -(-rows // BLOCK)) if blocks else (1, rows)
        rest = ((BLOCK, BLOCK), self.draw.dtype) if blocks else (self.draw.dtype,)

        def scales(seed: int, count: int, size: float) -> Tensor:
            return (self.draw.normal(seed, count, groups).float().abs() + 1.0) * size

        def make(seed: int) -> tuple[Any, ...]:
            x_TI, weight_OI = self._values(4 * seed, tokens, columns), self._values(4 * seed + 1, rows, columns)
            weight_scale_QG = scales(4 * seed + 3, runs, _WEIGHT_SCALE)
            return x_TI, scales(4 * seed + 2, tokens, _SCALE), weight_OI, weight_scale_QG, *rest

        return make

    def _gated(self) -> Iterator[Case]:
        """Yield gate and up, and what they feed, of the models whose linears are given."""
        for size, tokens in ((size, t) for size in self.sizes if size.linears for t in self.gated_tokens):
            rows, columns = 2 * size.feed, size.embed
            yield Case(
                name=f"{size.name} {tokens} x {columns} -> 2 x {size.feed}",
                make=self._gated_product(rows, columns, tokens),
                nbytes=rows * columns + tokens * (columns + size.feed) + _FLOAT32_BYTES * (rows + 2),
                flops=2.0 * tokens * rows * columns,
                kind=FP8_PRODUCTS,
            )

    def _gated_product(self, rows: int, columns: int, tokens: int) -> Make:
        """Return what makes gates and ups of about one, and static scales."""
        size = columns**-0.5 / _DEVIATION
        scale, x_scale = (torch.tensor(value, device=self.draw.device) for value in (_SCALE, 1 / _DEVIATION))

        def make(seed: int) -> tuple[Any, ...]:
            x_TI, weight_OI = self._values(3 * seed, tokens, columns), self._values(3 * seed + 1, rows, columns)
            weight_scale_O1 = (self.draw.normal(3 * seed + 2, rows, 1).float().abs() + 0.5) * size
            return x_TI, x_scale, weight_OI, weight_scale_O1, self.draw.dtype, scale

        return make

    def _values(self, seed: int, *shape: int) -> Tensor:
        """Return random FP8 values that use most of its range."""
        return (self.draw.normal(seed, *shape) * _DEVIATION).clamp(-FP8_MAX, FP8_MAX).to(FP8)

    def _rows(self, op: str) -> Iterator[Case]:
        inputs, wide, fed = PRODUCERS[op]
        for size, tokens in ((size, t) for size in self.sizes for t in self.tokens):
            width = size.feed if fed else size.embed
            moved = self._item * (inputs * wide + (1 if inputs == 2 else 0)) + 1  # a sum is written too
            for name, scale, group in _SCALINGS:
                yield Case(
                    name=f"{size.name} {tokens} x {width}, {name}",
                    make=self._producer(op, tokens, width, scale, group),
                    nbytes=moved * tokens * width,
                    kind=NO_TENSOR_CORES,
                )

    def _producer(self, op: str, tokens: int, width: int, scale: float | None, group: int | None) -> Make:
        inputs, wide, _ = PRODUCERS[op]
        static = None if scale is None else torch.tensor(scale, device=self.draw.device)
        vectors = {"rms_norm_fp8": 1, "layer_norm_fp8": 2}.get(op, 0)
        rest = (*(self.draw.normal(1 + i, width) for i in range(vectors)), *([_EPS] if vectors else []))

        def make(seed: int) -> tuple[Any, ...]:
            rows = (self.draw.normal(10 + 2 * seed + i, tokens, wide * width) for i in range(inputs))
            return (*rows, *rest, static, None if scale is not None else _BOUND, group)

        return make

    @property
    def _item(self) -> int:
        return self.draw.dtype.itemsize
