"""4-bit linears in plain torch: the CPU path, and the definition of every INT4 kernel.

T tokens, I inputs, O outputs, G groups of S inputs, R rows (outputs) of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from attrs import define, field
from torch import Tensor, nn

from paddock import axes
from paddock.layers import (
    Activation,
    LinearLayer,
    LinearMethod,
    PlainMethod,
    QuantizedActivation,
    allocate,
    reference,
    torch_dtype,
)
from paddock_quant_awq.dummy import randomise
from paddock_quant_awq.layout import (
    HALF,
    MIDDLE,
    Int4Form,
    fill_groups,
    pack,
    pack_zeros,
    unpack,
    unpack_zeros,
)
from paddock_quant_awq.scheme import Int4Scheme
from paddock_quant_awq.stored import Stored, fill_absent
from paddock_quant_awq.words import WORD

# Bytes of weights held in float32 at a time. A CPU keeps the smaller piece in its cache: 2048 x 4096 weights times one token took
# 8 to 16 ms in pieces of 4 MiB and 84 to 140 in pieces of 64, on one core; a GPU wants few launches.
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


def linear_method(scheme: Int4Scheme, path: str, linear: axes.Linear) -> LinearMethod:
    """Return how `linear`, whose first part is at checkpoint prefix `path`, is stored and multiplied."""
    tensors = scheme.tensors(path, linear)
    if scheme.stores_plainly(path, linear):
        return PlainMethod(tensors)
    return Int4Method(path=path, scheme=scheme, tensors=tensors)


@define(kw_only=True, eq=False)
class Int4Method:
    """A weight of 4 bits, one scale and perhaps a zero point a group. Returns the model's dtype.

    Before `finalise` the layer holds what the checkpoint does. After it, of every checkpoint: `packed` [B, O, 64] uint8 and
    `group_scales` [G, O] in the form of `paddock_quant_awq.layout`, whose sizes `form` says; `group_zeros` [G, P] uint8 where a
    zero is not 8; `input_factor` [I] float32 where inputs are multiplied first, then `input_order` [I] where they are reordered.
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

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the parameters by tensor name, uninitialised but for those a checkpoint may lack."""
        parameters = allocate(linear, self.tensors, device)
        fill_absent(parameters)
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
        """Return x W^T [T, O], summed in float32 and rounded once.

        With FP8 inputs it is scale_T * sum over groups of scale_G * (sum of xq (code - zero)): the codes are exact in FP8.
        """
        if not self.scheme.fp8_inputs:
            assert isinstance(x_TI, Tensor), "a linear with 16-bit inputs takes plain activations"
            return self._times_dequantised(layer, self._prepared(layer, x_TI))
        if isinstance(x_TI, Tensor):
            if self.input_format == axes.FP8_TOKEN:
                x_TI = layer.ops.quantize_fp8_token(x_TI, None)
            else:
                x_TI = reference.quantize_fp8_token(self._prepared(layer, x_TI))
        return self._times_codes(layer, x_TI)

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32, columns as the inputs come."""
        weight_OI = torch.cat([_weight(layer, self._form, rows) for rows in self._chunks(layer.get_parameter("packed").device)])
        order_I, factor_I = _held(layer, "input_order"), _held(layer, "input_factor")
        if order_I is not None:
            weight_OI = weight_OI[:, order_I.argsort()]
        return weight_OI if factor_I is None else weight_OI * factor_I

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the numbers with random bits, and the scales so that outputs keep their inputs' magnitude."""
        randomise(self.scheme, layer, self.tensors, generator)

    @property
    def _form(self) -> Int4Form:
        assert self.form is not None, f"{self.path} is used before finalise"
        return self.form

    def _chunks(self, device: torch.device) -> Iterator[slice]:
        """Yield slices of outputs whose weights are small enough to hold in float32."""
        step = max(1, _CHUNK_BYTES[device.type] // (4 * self._form.inputs))
        for start in range(0, self._form.outputs, step):
            yield slice(start, min(start + step, self._form.outputs))

    def _prepared(self, layer: LinearLayer, x_TI: Tensor) -> Tensor:
        """Return x in float32, multiplied and reordered as the groups want it."""
        order_I, factor_I, x32_TI = _held(layer, "input_order"), _held(layer, "input_factor"), x_TI.float()
        if factor_I is not None:
            x32_TI = x32_TI * factor_I
        return x32_TI if order_I is None else x32_TI.index_select(1, order_I)

    def _times_dequantised(self, layer: LinearLayer, x32_TI: Tensor) -> Tensor:
        y_TO = x32_TI.new_empty((len(x32_TI), self._form.outputs), dtype=self.dtype)
        for rows in self._chunks(x32_TI.device):
            y_TO[:, rows] = (x32_TI @ _weight(layer, self._form, rows).T).to(self.dtype)
        return y_TO

    def _times_codes(self, layer: LinearLayer, xq: QuantizedActivation) -> Tensor:
        form, x32_TI = self._form, xq.values_TI.float()
        y_TO = x32_TI.new_empty((len(x32_TI), form.outputs), dtype=self.dtype)
        for rows in self._chunks(x32_TI.device):
            numbers_RGS, scales_RG1 = _numbers(layer, form, rows), _scales(layer, form, rows)
            sum_TR = x32_TI.new_zeros((len(x32_TI), len(numbers_RGS)))
            for g, x_TS in enumerate(torch.split_with_sizes(x32_TI, [form.group] * form.groups, dim=1)):
                sum_TR += (x_TS @ numbers_RGS[:, g].T) * scales_RG1[:, g, 0]
            y_TO[:, rows] = (sum_TR * xq.scale).to(self.dtype)
        return y_TO


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
    """Return the weight in its final form [B, O, J], a bounded number of outputs at a time."""
    device = stored.device
    packed_BOJ = torch.empty((form.blocks, form.outputs, HALF), dtype=torch.uint8, device=device)
    step = max(WORD, _CHUNK_BYTES[device.type] // (4 * form.inputs) // WORD * WORD)
    first = 0
    for part, share in enumerate(stored.layer.linear.out):
        for start in range(0, share.size, step):
            stop = min(start + step, share.size)
            codes_RI = stored.codes(part, slice(start, stop))
            if order_I is not None:
                codes_RI = codes_RI[:, order_I]
            packed_BOJ[:, first + start : first + stop] = pack(codes_RI)
        first += share.size
    return packed_BOJ


def _weight(layer: LinearLayer, form: Int4Form, rows: slice) -> Tensor:
    """Return the weight of some outputs [R, I] in float32."""
    return (_numbers(layer, form, rows) * _scales(layer, form, rows)).flatten(1)


def _numbers(layer: LinearLayer, form: Int4Form, rows: slice) -> Tensor:
    """Return code - zero of some outputs [R, G, S] in float32: whole numbers."""
    codes_RI = unpack(layer.get_parameter("packed")[:, rows], form.inputs)
    codes_RGS = codes_RI.reshape(len(codes_RI), form.groups, form.group).float()
    zeros_GP = _held(layer, "group_zeros")
    if zeros_GP is None:
        return codes_RGS - MIDDLE
    zeros_GR = unpack_zeros(zeros_GP[: form.groups], form.outputs)[:, rows]
    return codes_RGS - zeros_GR.T.unsqueeze(-1)


def _scales(layer: LinearLayer, form: Int4Form, rows: slice) -> Tensor:
    """Return the scales of some outputs [R, G, 1] in float32."""
    scales_GR = layer.get_parameter("group_scales")[: form.groups, rows]
    return scales_GR.T.float().unsqueeze(-1)


def _held(layer: LinearLayer, name: str) -> Tensor | None:
    found = getattr(layer, name, None)
    return found if isinstance(found, Tensor) else None
