"""How a 4-bit checkpoint stores its linears: one description for all formats. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from attrs import evolve, field, frozen

from paddock.axes import FP8_TOKEN, PLAIN, VOCAB, Linear, Tensor, TensorAxis, left_plain
from paddock.errors import PlanError

# How the weight's numbers lie in the checkpoint.
AWQ_GEMM = "awq gemm"  # qweight: eight outputs to a word, in the order 0 2 4 6 1 3 5 7
GPTQ = "gptq"  # qweight: eight inputs to a word
PACKED = "pack-quantized"  # weight_packed: eight inputs to a word
UNPACKED = "int-quantized"  # weight: an int8 for each
PAIRS = "modelopt"  # weight: two outputs to a byte

WORD = 8
# A rank may begin inside a group, at a multiple of this: the matrix unit's shortest step along the inputs (FP8).
SLICE = 32
# What is kept of every packing is filled up to whole tiles of the matrix unit: `paddock.layers.int4`, which needs torch.
OUTPUTS, BLOCK = 64, 128
_OUT, _IN = TensorAxis("out", fill=OUTPUTS), TensorAxis("in", fill=BLOCK)
_OUT_WORDS, _IN_WORDS = TensorAxis("out", pack=WORD, fill=OUTPUTS), TensorAxis("in", pack=WORD, fill=BLOCK)
_PLAIN_OUT, _PLAIN_IN = TensorAxis("out"), TensorAxis("in")
_SHAPE = Tensor("weight_shape", "int64", (TensorAxis("fixed", entries=2),), optional=True)


class PlainModules(Protocol):
    """Which modules a checkpoint leaves plain."""

    def __call__(self, path: str, *, head: bool = False) -> bool:
        """Return whether the module at checkpoint prefix `path` is one of them; `head`: it projects to the vocabulary."""


def nothing(path: str, *, head: bool = False) -> bool:
    """Return False: no module is left plain."""
    return False


@frozen(kw_only=True)
class Int4Scheme:
    """A 4-bit checkpoint: `name` as the user knows it, `packing` one of the constants above, one scale for `group_size` inputs.

    `group_size` -1 is one group an output. `is_plain(path)` says which modules the checkpoint leaves alone; the head is one of
    them unless `quantises_head`. In a `symmetric` checkpoint every zero point is 8; to those stored, `zero_offset` is added.
    `reorders`: inputs belong to groups in an order of their own (`g_idx`). `fp8_inputs`: the format rounds
    activations to FP8, a scale a token; `fp8_inputs_from` says from how many tokens a step on that is done, None for never,
    and is 1 or None unless planning chooses otherwise; `fp8_weights_from` likewise of weights, which then have a scale an output
    and, with `keeps_fp8_weights`, are kept.
    `signed_scales`: a scale may be negative, as AutoRound's are. `scale_dtype` is what scales are kept in, and, unless planning
    finds another in the checkpoint's files, stored in.
    """

    name: str
    dtype: str
    packing: str
    group_size: int
    scale_dtype: str = "float16"
    symmetric: bool = False
    zero_offset: int = 0
    reorders: bool = False
    fp8_inputs: bool = False
    signed_scales: bool = False
    is_plain: PlainModules = nothing
    quantises_head: bool = False
    kv_cache_dtype: str | None = None
    fp8_inputs_from: int | None = field()
    fp8_weights_from: int | None = None
    keeps_fp8_weights: bool = False

    @fp8_inputs_from.default
    def _as_made_for(self) -> int | None:
        return 1 if self.fp8_inputs else None

    @property
    def input_format(self) -> str:
        """Return the activation its linears take best, from `fp8_inputs_from` tokens on."""
        return PLAIN if self.fp8_inputs_from is None else FP8_TOKEN

    @property
    def scale_name(self) -> str:
        """Return the name of the tensors that hold scales."""
        return "scales" if self.packing in (AWQ_GEMM, GPTQ) else "weight_scale"

    def with_scale_dtype(self, dtype: str) -> Int4Scheme:
        """Return the scheme with its scales kept in another dtype."""
        return evolve(self, scale_dtype=dtype)

    def with_fp8_from(self, inputs: int | None, weights: int | None, *, keep: bool = False) -> Int4Scheme:
        """Return the scheme with activations rounded to FP8 from so many tokens a step on, and weights; None for never.

        With `keep` rounded weights are kept.
        """
        assert weights is not None or not keep, "there are no rounded weights to keep"
        return evolve(self, fp8_inputs_from=inputs, fp8_weights_from=weights, keeps_fp8_weights=keep)

    def stores_plainly(self, path: str, linear: Linear) -> bool:
        """Return whether `linear`, whose first part is at checkpoint prefix `path`, is left alone.

        Raises PlanError where parts that run as one product differ.
        """
        head = linear.out[0].axis == VOCAB
        if head and not self.quantises_head:
            return True
        return left_plain(path, linear, partial(self.is_plain, head=head))

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return what holds `linear`; raise PlanError when a group, a word or a pair would not be whole."""
        if self.stores_plainly(path, linear):
            return (Tensor("weight", self.dtype, (_PLAIN_OUT, _PLAIN_IN)),)
        self._check(path, linear)
        return _TENSORS[self.packing](self, path, linear)

    def groups(self, linear: Linear) -> TensorAxis:
        """Return the axis with an entry a group; groups that follow an order of their own are never cut."""
        if self.group_size == -1:
            return TensorAxis("in", group=-1, fill=BLOCK)
        cut = SLICE if self.group_size % SLICE == 0 else self.group_size
        return TensorAxis("in", group=self.group_size, cut=linear.in_size if self.reorders else cut, fill=BLOCK)

    def _check(self, path: str, linear: Linear) -> None:
        if self.group_size > 0 and linear.in_size % self.group_size:
            divisors = math.gcd(linear.in_size, self.group_size)
            raise PlanError(
                f"{path} has {linear.in_size} inputs, which groups of {self.group_size} do not divide",
                fix=f"use a checkpoint whose group size divides {linear.in_size}, as {divisors} does, or leaves it plain",
            )
        together, unit = {AWQ_GEMM: (WORD, "word"), GPTQ: (WORD, "word"), PAIRS: (2, "byte")}.get(self.packing, (1, ""))
        for part in linear.out:
            if part.size % together:
                raise PlanError(
                    f"{path}: part {part.name!r} has {part.size} outputs, and {self.name} packs them {together} to a {unit}",
                    fix="leave this linear plain in the checkpoint",
                )
        if self.packing == GPTQ and linear.in_size % WORD:
            raise PlanError(
                f"{path} has {linear.in_size} inputs, and {self.name} packs them {WORD} to a word",
                fix="leave this linear plain in the checkpoint",
            )


def _awq_gemm(scheme: Int4Scheme, path: str, linear: Linear) -> tuple[Tensor, ...]:
    groups = scheme.groups(linear)
    return (
        Tensor("qweight", "int32", (_IN, _OUT_WORDS)),
        Tensor("qzeros", "int32", (groups, _OUT_WORDS)),
        Tensor("scales", scheme.scale_dtype, (groups, _OUT)),
    )


def _gptq(scheme: Int4Scheme, path: str, linear: Linear) -> tuple[Tensor, ...]:
    groups = scheme.groups(linear)
    # AutoGPTQ wrote a bias of zeros for every linear, of models too that have none.
    spare = () if linear.bias else (Tensor("spare_bias", "float32", (_PLAIN_OUT,), optional=True, stored_as="{part}.bias"),)
    return (
        *spare,
        Tensor("qweight", "int32", (_IN_WORDS, _OUT)),
        Tensor("qzeros", "int32", (groups, _OUT_WORDS)),
        Tensor("scales", scheme.scale_dtype, (groups, _OUT)),
        Tensor("g_idx", "int32", (_PLAIN_IN,), optional=not scheme.reorders),
    )


def _compressed(scheme: Int4Scheme, path: str, linear: Linear) -> tuple[Tensor, ...]:
    groups = scheme.groups(linear)
    if scheme.packing == PACKED:
        weight: tuple[Tensor, ...] = (Tensor("weight_packed", "int32", (_OUT, _IN_WORDS)), _SHAPE)
        zeros = Tensor("weight_zero_point", "int32", (_OUT_WORDS, groups))
    else:
        weight = (Tensor("weight", "int8", (_OUT, _IN)),)
        zeros = Tensor("weight_zero_point", "int8", (_OUT, groups))
    scales = Tensor("weight_scale", scheme.scale_dtype, (_OUT, groups))
    order = (Tensor("weight_g_idx", "int32", (_PLAIN_IN,)),) if scheme.reorders else ()
    return (*weight, scales, *(() if scheme.symmetric else (zeros,)), *order)


def _pairs(scheme: Int4Scheme, path: str, linear: Linear) -> tuple[Tensor, ...]:
    stored = (
        Tensor("weight", "uint8", (TensorAxis("out", pack=2, fill=OUTPUTS), _IN)),
        Tensor("weight_scale", scheme.scale_dtype, (_OUT, scheme.groups(linear))),
        Tensor("pre_quant_scale", "float32", (_PLAIN_IN,), optional=True),
    )
    static = (Tensor("weight_scale_2", "float32"), Tensor("input_scale", "float32"))
    return (*stored, *static) if scheme.fp8_inputs else stored


_TENSORS: dict[str, Callable[[Int4Scheme, str, Linear], tuple[Tensor, ...]]] = {
    AWQ_GEMM: _awq_gemm,
    GPTQ: _gptq,
    PACKED: _compressed,
    UNPACKED: _compressed,
    PAIRS: _pairs,
}
