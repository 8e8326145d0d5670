"""The sizes at which products with 4-bit weights are measured.

T tokens, I, O input and output features; B, S, G, F, P as `paddock.layers.int4` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import frozen

from paddock.bench.kernels.case import Case, Draw, Make
from paddock.layers import reference
from paddock.layers.int4 import SLAB_BYTES, Int4Form, Int4Weight
from paddock.planning.roofs import BF16, FP8, NO_TENSOR_CORES

_DEVIATION = 6.5  # of the difference of two uniform numbers 0..15
_FLOAT32_BYTES = 4


@frozen(kw_only=True)
class Int4Size:
    """A model's: its name, inputs to a scale, and the linears (O, I) of its layers."""

    name: str
    group: int
    linears: tuple[tuple[int, int], ...]


LLAMA_70B = Int4Size(name="70B", group=128, linears=((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)))
FALCON_180B = Int4Size(name="Falcon-180B", group=128, linears=((15872, 14848), (14848, 14848), (59392, 14848), (14848, 59392)))
QUICK = Int4Size(name="quick", group=32, linears=((80, 96),))
TO_FP8 = "int4_to_fp8"
INT4_OPS = ("linear_int4", "linear_int4_fp8", TO_FP8)


@frozen(eq=False, kw_only=True)
class Int4Cases:
    """Makes the cases of `linear_int4`, `linear_int4_fp8` and `int4_to_fp8`: weights with zero points, as AutoAWQ's."""

    sizes: tuple[Int4Size, ...]
    tokens: tuple[int, ...]
    draw: Draw

    def of(self, op: str) -> Iterator[Case]:
        """Yield the cases of an op; its bytes are those of the weight as it lies, x in its own type, and the result."""
        if op == TO_FP8:
            yield from self._weights()
            return
        fp8 = op == "linear_int4_fp8"
        item = self.draw.dtype.itemsize
        halves = BF16 if item == 2 else NO_TENSOR_CORES
        for size in self.sizes:
            for (rows, columns), tokens in ((shape, t) for shape in size.linears for t in self.tokens):
                form = Int4Form(inputs=columns, outputs=rows, group=size.group)
                x_bytes = tokens * (columns + _FLOAT32_BYTES if fp8 else columns * item)
                yield Case(
                    name=f"{size.name} {tokens} x {columns} -> {rows}",
                    make=self._product(form, tokens, fp8=fp8),
                    nbytes=_weight_bytes(form, item) + x_bytes + tokens * rows * item,
                    flops=2.0 * tokens * rows * columns,
                    kind=FP8 if fp8 else halves,
                )

    def _weights(self) -> Iterator[Case]:
        """Yield the cases of a weight in another form."""
        item = self.draw.dtype.itemsize
        for size, (rows, columns) in ((model, linear) for model in self.sizes for linear in model.linears):
            form = Int4Form(inputs=columns, outputs=rows, group=size.group)
            yield Case(
                name=f"{size.name} {columns} -> {rows}",
                make=self._scaled(form),
                nbytes=_weight_bytes(form, item) + rows * columns + _FLOAT32_BYTES * rows,
                kind=NO_TENSOR_CORES,
            )

    def _scaled(self, form: Int4Form) -> Make:
        def make(seed: int) -> tuple[Any, ...]:
            weight = self._weight(seed, form)
            return weight, weight.row_scales()

        return make

    def _product(self, form: Int4Form, tokens: int, *, fp8: bool) -> Make:
        def make(seed: int) -> tuple[Any, ...]:
            x_TI, weight = self.draw.normal(2 * seed, tokens, form.inputs), self._weight(2 * seed + 1, form)
            if not fp8:
                return x_TI, weight
            x = reference.quantize_fp8_token(x_TI)
            return x.values_TI, x.scale, weight, self.draw.dtype

        return make

    def _weight(self, seed: int, form: Int4Form) -> Int4Weight:
        """Return random codes, zeros and scales. What fills up has scale 0, and codes and zeros that must not matter then."""
        packed_BSN = self.draw.whole(seed, 0, 256, form.blocks, form.slabs, SLAB_BYTES, dtype=torch.uint8)
        zeros_GP = self.draw.whole(seed + 1, 0, 256, form.group_rows, form.filled_outputs // 2, dtype=torch.uint8)
        normal_GF = self.draw.normal(seed + 2, form.group_rows, form.filled_outputs)
        scales_GF = (normal_GF.abs() + 0.5) * (form.inputs**-0.5 / _DEVIATION)
        scales_GF[form.groups :], scales_GF[:, form.outputs :] = 0, 0
        return Int4Weight(form=form, packed=packed_BSN, scales=scales_GF, zeros=zeros_GP)


def _weight_bytes(form: Int4Form, item: int) -> int:
    """Return the least bytes of a weight: half a byte a code, a scale of the activations' type and half a byte a group."""
    return form.inputs * form.outputs // 2 + form.groups * form.outputs * item + form.groups * form.outputs // 2
