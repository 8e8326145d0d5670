"""4-bit linears: how they are loaded, and which op of the core multiplies them.

T tokens, I inputs, O outputs, G groups of the inputs, R rows (outputs) of a piece; B, S, N, F, P as `paddock.layers.int4` says.
"""

from __future__ import annotations

import math

import torch
from attrs import define, field
from torch import Tensor, nn

from paddock import axes
from paddock.layers import (
    Activation,
    LinearLayer,
    LinearMethod,
    PlainMethod,
    allocate,
    torch_dtype,
)
from paddock.layers.int4 import SLAB, SLAB_BYTES, Int4Form, Int4Weight, fill_groups, pack, pack_zeros, pieces
from paddock_quant_awq.dummy import randomise
from paddock_quant_awq.scheme import Int4Scheme
from paddock_quant_awq.stored import Stored, fill_absent

KEPT = "fp8_weight"


def linear_method(scheme: Int4Scheme, path: str, linear: axes.Linear) -> LinearMethod:
    """Return how `linear`, whose first part is at checkpoint prefix `path`, is stored and multiplied."""
    tensors = scheme.tensors(path, linear)
    if scheme.stores_plainly(path, linear):
        return PlainMethod(tensors)
    return Int4Method(path=path, scheme=scheme, tensors=tensors)


@define(kw_only=True, eq=False)
class Int4Method:
    """A weight of 4 bits, one scale and perhaps a zero point a group. Returns the model's dtype.

    Before `finalise` the layer holds what the checkpoint does. After it, of every checkpoint: `packed` [B, S, N] uint8 and
    `group_scales` [G, F] in the form of `paddock.layers.int4`, whose sizes `form` says; `group_zeros` [G, P] uint8 where a zero
    is not 8; `input_factor` [I] float32 where inputs are multiplied first, then `input_order` [I] where they are reordered;
    `row_scale` [O, 1] float32 where weights are rounded to FP8 in large steps. `fp8_weight` [O, I] is there where those are kept.
    """

    path: str
    scheme: Int4Scheme
    tensors: tuple[axes.Tensor, ...]
    input_format: str = field(default=axes.PLAIN, init=False)
    input_bound: float | None = field(default=None, init=False)
    form: Int4Form | None = field(default=None, init=False)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the output."""
        return torch_dtype(self.scheme.dtype)

    @property
    def input_format_from(self) -> int:
        """Return the tokens from which the input format holds; fewer are taken plain."""
        return self.scheme.fp8_inputs_from or 1

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the parameters by tensor name, uninitialised but for those a checkpoint may lack.

        A weight that is kept in FP8 has its place from the start: made amid what loading frees, it would leave gaps there.
        """
        parameters = allocate(linear, self.tensors, device)
        fill_absent(parameters)
        if self.scheme.keeps_fp8_weights:
            shape = linear.out_size, linear.inp.size
            parameters[KEPT] = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return parameters

    def finalise(self, layer: LinearLayer) -> None:
        """Check what was loaded and repack it; raise CheckpointError for a number that cannot be."""
        stored = Stored(scheme=self.scheme, path=self.path, layer=layer, tensors=self.tensors)
        stored.check()
        factor_I, order_I, scales_GO, zeros_GO = stored.input_factor(), stored.order(), stored.scales(), stored.zeros()
        share = layer.linear.inp
        group, rows_G = local_groups(self.scheme.group_size, share.start, share.size, scales_GO.device)
        self.form = Int4Form(inputs=share.size, outputs=layer.linear.out_size, group=group)
        kept = {"packed": _repacked(stored, self.form, order_I), "group_scales": fill_groups(scales_GO[rows_G], self.form)}
        if zeros_GO is not None:
            kept["group_zeros"] = pack_zeros(fill_groups(zeros_GO[rows_G], self.form))
        if self.scheme.fp8_weights_from is not None:
            held = Int4Weight(form=self.form, packed=kept["packed"], scales=kept["group_scales"], zeros=kept.get("group_zeros"))
            kept["row_scale"] = held.row_scales()
            if self.scheme.keeps_fp8_weights:
                layer.get_parameter(KEPT).copy_(layer.ops.int4_to_fp8(held, kept["row_scale"]))
        kept |= {name: each for name, each in (("input_factor", factor_I), ("input_order", order_I)) if each is not None}
        for tensor in self.tensors:
            delattr(layer, tensor.name)
        for name, each in kept.items():
            layer.register_parameter(name, nn.Parameter(each, requires_grad=False))
        if factor_I is None and order_I is None:
            self.input_format = self.scheme.input_format

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return None: no input has a static scale."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O]: by `linear_int4`, or by `linear_int4_fp8` with each token rounded to FP8 by its own scale.

        Which of the two is the scheme's choice, by the number of tokens; from another number on the weight is rounded to FP8 as
        well, a scale an output, and the product is `linear_fp8`.
        """
        weight = self._weight(layer)
        if isinstance(x_TI, Tensor):
            x_TI = _prepared(layer, x_TI)
            if self.scheme.fp8_inputs_from is None or len(x_TI) < self.scheme.fp8_inputs_from:
                return layer.ops.linear_int4(x_TI, weight)
            x_TI = layer.ops.quantize_fp8_token(x_TI, None)
        border = self.scheme.fp8_weights_from
        if border is not None and len(x_TI.values_TI) >= border:
            scale_O1 = layer.get_parameter("row_scale")
            kept_OI = _held(layer, KEPT)
            weight_OI = layer.ops.int4_to_fp8(weight, scale_O1) if kept_OI is None else kept_OI
            return layer.ops.linear_fp8(x_TI.values_TI, x_TI.scale, weight_OI, scale_O1, self.dtype)
        return layer.ops.linear_int4_fp8(x_TI.values_TI, x_TI.scale, weight, self.dtype)

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32, columns as the inputs come."""
        weight = self._weight(layer)
        weight_OI = torch.cat([weight.dequantise(rows) for rows in weight.pieces()])
        order_I, factor_I = _held(layer, "input_order"), _held(layer, "input_factor")
        if order_I is not None:
            weight_OI = weight_OI[:, order_I.argsort()]
        return weight_OI if factor_I is None else weight_OI * factor_I

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the numbers with random bits, and the scales so that outputs keep their inputs' magnitude."""
        randomise(self.scheme, layer, self.tensors, generator)

    def _weight(self, layer: LinearLayer) -> Int4Weight:
        assert self.form is not None, f"{self.path} is used before finalise"
        packed_BSN, scales_GF = layer.get_parameter("packed"), layer.get_parameter("group_scales")
        return Int4Weight(form=self.form, packed=packed_BSN, scales=scales_GF, zeros=_held(layer, "group_zeros"))


def _prepared(layer: LinearLayer, x_TI: Tensor) -> Tensor:
    """Return x multiplied, rounded to its dtype, and reordered as the groups want it."""
    order_I, factor_I = _held(layer, "input_order"), _held(layer, "input_factor")
    if factor_I is not None:
        x_TI = (x_TI * factor_I).to(x_TI.dtype)
    return x_TI if order_I is None else x_TI.index_select(1, order_I)


def local_groups(group: int, start: int, size: int, device: torch.device) -> tuple[int, Tensor]:
    """Return the group size of a share of `size` inputs from input `start` on, and which stored group each of its groups is of.

    Stored are the groups the share touches. Where its ends slice groups of `group`, all are divided into pieces that fit.
    """
    if group == -1:
        return size, torch.zeros(1, dtype=torch.int64, device=device)
    piece = math.gcd(group, start, size) if start % group or size % group else group
    starts_G = start + piece * torch.arange(size // piece, device=device)
    return piece, starts_G // group - start // group


def _repacked(stored: Stored, form: Int4Form, order_I: Tensor | None) -> Tensor:
    """Return the weight in its final form [B, S, N], a bounded number of outputs at a time."""
    packed_BSN = torch.empty((form.blocks, form.slabs, SLAB_BYTES), dtype=torch.uint8, device=stored.device)
    for rows in pieces(form, stored.device):
        codes_RI = stored.codes(rows)
        if order_I is not None:
            codes_RI = codes_RI[:, order_I]
        piece_BSN = pack(codes_RI)
        packed_BSN[:, rows.start // SLAB :][:, : piece_BSN.shape[1]] = piece_BSN
    return packed_BSN


def _held(layer: LinearLayer, name: str) -> Tensor | None:
    found = getattr(layer, name, None)
    return found if isinstance(found, Tensor) else None
