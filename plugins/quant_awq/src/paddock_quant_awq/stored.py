"""A linear's loaded parameters, read in the same terms whatever the checkpoint's packing: codes and zeros 0..15, scales.

Signed numbers become codes by adding 8, and so do their zero points. R rows (outputs) of one part, I inputs, O outputs of all
parts, G stored groups, P parts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attrs import frozen
from torch import Tensor

from paddock import axes
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, part_spans
from paddock.layers.int4 import MIDDLE
from paddock_quant_awq import scheme as schemes
from paddock_quant_awq.scheme import Int4Scheme
from paddock_quant_awq.words import AWQ_ORDER, IN_ORDER, WORD, unpack

LARGEST = 15
_WEIGHT = {
    schemes.AWQ_GEMM: "qweight",
    schemes.GPTQ: "qweight",
    schemes.PACKED: "weight_packed",
    schemes.UNPACKED: "weight",
    schemes.PAIRS: "weight",
}
_FIX = "make or download the checkpoint again"
_OTHER_VERSION = (
    "name the version of the layout that the files are in: checkpoint_format gptq stores zero points less 1, gptq_v2 as they are "
    "(packing_format auto_round:auto_gptq and auto_round); or set sym to false if they are meant"
)


@frozen(kw_only=True)
class Stored:
    """The parameters of `layer` as loaded, packed as `scheme` says; `path` is the checkpoint prefix of its first part."""

    scheme: Int4Scheme
    path: str
    layer: LinearLayer
    tensors: tuple[axes.Tensor, ...]

    @property
    def device(self) -> torch.device:
        """Return where the parameters lie."""
        return self.layer.get_parameter(_WEIGHT[self.scheme.packing]).device

    def codes(self, rows: slice) -> Tensor:
        """Return codes [R, I] of outputs `rows` of any parts, which begin and end at multiples of 8 or with the last part."""
        found, first = [], 0
        for part, share in enumerate(self.layer.linear.out):
            start, stop = max(rows.start - first, 0), min(rows.stop - first, share.size)
            if start < stop:
                found.append(self._codes(part, slice(start, stop)))
            first += share.size
        return torch.cat(found)

    def scales(self) -> Tensor:
        """Return the scales [G, O] in their dtype; raise CheckpointError for one that cannot be."""
        stored = self.layer.get_parameter(self.scheme.scale_name).detach()
        scales_GO = stored if self.scheme.packing in (schemes.AWQ_GEMM, schemes.GPTQ) else stored.T
        good_GO = scales_GO.isfinite() & ((scales_GO != 0) if self.scheme.signed_scales else (scales_GO > 0))
        allowed = "a number other than 0" if self.scheme.signed_scales else "positive"
        if not bool(good_GO.all()):  # of every linear: parts are looked at only where one is bad
            self._demand_each(self._by_part(good_GO), self._by_part(scales_GO), "scales", allowed)
        return scales_GO.contiguous()

    def zeros(self) -> Tensor | None:
        """Return the zeros [G, O] (uint8), None where every one is 8; raise CheckpointError for one beyond 0..15."""
        if self.scheme.symmetric and self.scheme.packing != schemes.GPTQ:
            return None
        parts = [self._zeros(part) for part in range(len(self.layer.linear.out))]
        zeros_GO = torch.cat(parts, dim=1)
        return None if bool((zeros_GO == MIDDLE).all()) else zeros_GO

    def order(self) -> Tensor | None:
        """Return which input each place of the groups takes, [I] int64, None where inputs lie in order.

        Raises CheckpointError for groups that do not exist or are not all of one size, and where fused parts or ranks differ.
        """
        name = next((t.name for t in self.tensors if t.name in ("g_idx", "weight_g_idx")), "")
        if not name:
            return None
        share, whole = self.layer.linear.inp, self.layer.whole.inp.size
        size = whole if self.scheme.group_size == -1 else self.scheme.group_size
        g_idx_PI = self.layer.get_parameter(name).detach().long()
        in_order_I = torch.arange(share.start, share.start + share.size, device=g_idx_PI.device) // size
        g_idx_PI = torch.where(g_idx_PI == _ABSENT, in_order_I, g_idx_PI)
        inside_PI = (g_idx_PI >= 0) & (g_idx_PI < whole // size)
        self._demand_each(inside_PI, g_idx_PI, name, f"a group from 0 to {whole // size - 1}")
        g_idx_I = g_idx_PI[0]
        if not bool((g_idx_PI == g_idx_I).all()):
            raise CheckpointError(
                f"{self.path}: its {name} differs from that of {self._others()}, which run as one product", fix=_FIX
            )
        if torch.equal(g_idx_I, in_order_I):
            return None
        if share.size != whole:
            raise CheckpointError(
                f"{self.path}: {name} reorders the inputs, which several ranks share", fix="use tensor_parallel_size 1"
            )
        counts = torch.bincount(g_idx_I, minlength=whole // size)
        if not bool((counts == size).all()):
            raise CheckpointError(
                f"{self.path}: {name} gives group {int((counts != size).nonzero()[0])} "
                f"{int(counts[counts != size][0])} inputs, not {size}",
                fix=_FIX,
            )
        return g_idx_I.argsort(stable=True)

    def input_factor(self) -> Tensor | None:
        """Return what the inputs are multiplied with first, [I] float32, None where that is 1."""
        name = "pre_quant_scale"
        if name not in {tensor.name for tensor in self.tensors}:
            return None
        factor_PI = self.layer.get_parameter(name).detach()
        self._demand_each((factor_PI > 0) & factor_PI.isfinite(), factor_PI, name, "positive")
        if not bool((factor_PI == factor_PI[0]).all()):
            raise CheckpointError(
                f"{self.path}: its {name} differs from that of {self._others()}, which run as one product",
                fix="export the checkpoint with one scale for all that share an input",
            )
        return None if bool((factor_PI == 1).all()) else factor_PI[0].clone()

    def check(self) -> None:
        """Raise CheckpointError where the stored shape or a scalar that is not needed says something impossible."""
        names = {tensor.name for tensor in self.tensors}
        for name in ("weight_scale_2", "input_scale"):
            if name in names:
                scalar_P = self.layer.get_parameter(name)
                self._demand_each((scalar_P > 0) & scalar_P.isfinite(), scalar_P, name, "positive")
        if "spare_bias" in names:
            bias_O = self.layer.get_parameter("spare_bias")
            self._demand_each(self._by_part(bias_O == 0), self._by_part(bias_O), "bias", "0: the model has no bias there")
        if "weight_shape" not in names:
            return
        for part, shape in zip(self.layer.whole.out, self.layer.get_parameter("weight_shape").tolist(), strict=True):
            if shape != [_ABSENT, _ABSENT] and shape != [part.size, self.layer.whole.in_size]:
                raise CheckpointError(
                    f"{self.layer.source}{part.source}.weight_shape says {shape}; the model wants "
                    f"{[part.size, self.layer.whole.in_size]}",
                    fix="check that config.json belongs to these weights",
                )

    def _codes(self, part: int, rows: slice) -> Tensor:
        """Return codes [R, I] of outputs `rows` of a part. Parts that pack outputs to a word or a byte hold whole ones."""
        weight, first = self.layer.get_parameter(_WEIGHT[self.scheme.packing]), self._first_row(part)
        inputs, packing = self.layer.linear.in_size, self.scheme.packing
        if packing == schemes.AWQ_GEMM:
            words_IW = weight[:, first + rows.start // WORD : first + rows.stop // WORD]
            return unpack(words_IW, AWQ_ORDER).T
        if packing == schemes.GPTQ:
            return unpack(weight[:, first + rows.start : first + rows.stop].T, IN_ORDER)
        if packing == schemes.PACKED:
            return unpack(weight[first + rows.start : first + rows.stop], IN_ORDER)[:, :inputs]
        if packing == schemes.UNPACKED:
            return self._unsigned(weight[first + rows.start : first + rows.stop], "weight", part)
        bytes_HI = weight[first + rows.start // 2 : first + rows.stop // 2]
        nibbles_RI = torch.stack((bytes_HI & 15, bytes_HI >> 4), dim=1).flatten(0, 1)
        return nibbles_RI ^ MIDDLE  # two's complement, plus 8

    def _zeros(self, part: int) -> Tensor:
        packing, outputs = self.scheme.packing, self.layer.linear.out[part].size
        name = "qzeros" if packing in (schemes.AWQ_GEMM, schemes.GPTQ) else "weight_zero_point"
        tensor = next(tensor for tensor in self.tensors if tensor.name == name)
        region = part_spans(self.layer.linear, tensor)[part]
        stored = self.layer.get_parameter(name)[tuple(slice(*span) for span in region)]
        if packing == schemes.UNPACKED:
            return self._unsigned(stored, name, part).T
        if packing == schemes.PACKED:
            return unpack(stored.T, IN_ORDER)[:, :outputs]
        zeros_GR = unpack(stored, AWQ_ORDER if packing == schemes.AWQ_GEMM else IN_ORDER) + self.scheme.zero_offset
        named = f"{name} (stored less {self.scheme.zero_offset})"
        self._demand(zeros_GR <= LARGEST, zeros_GR, named, f"from 0 to {LARGEST}", part=part)
        if self.scheme.symmetric and packing == schemes.GPTQ:
            self._demand(zeros_GR == MIDDLE, zeros_GR, named, f"{MIDDLE} where sym is true", _OTHER_VERSION, part=part)
        return zeros_GR

    def _unsigned(self, signed: Tensor, name: str, part: int) -> Tensor:
        self._demand((signed >= -MIDDLE) & (signed < MIDDLE), signed, name, "from -8 to 7", part=part)
        return (signed + MIDDLE).to(torch.uint8)

    def _first_row(self, part: int) -> int:
        """Return where a part begins along the weight's `out` axis, in stored entries."""
        tensor = next(tensor for tensor in self.tensors if tensor.name == _WEIGHT[self.scheme.packing])
        axis = next(i for i, axis in enumerate(tensor.axes) if axis.side == "out")
        return part_spans(self.layer.linear, tensor)[part][axis][0]

    def _by_part(self, values_XO: Tensor) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(values_XO, [part.size for part in self.layer.linear.out], dim=-1)

    def _others(self) -> str:
        return ", ".join(f"{self.layer.source}{part.source}" for part in self.layer.linear.out[1:])

    def _demand_each(self, good_P: Iterable[Tensor], values_P: Iterable[Tensor], name: str, allowed: str) -> None:
        """Demand it of each part's numbers, in order."""
        for part, (good, values) in enumerate(zip(good_P, values_P, strict=True)):
            self._demand(good, values, name, allowed, part=part)

    def _demand(self, good: Tensor, values: Tensor, name: str, allowed: str, fix: str = _FIX, *, part: int) -> None:
        """Raise CheckpointError, with the part's own prefix in the checkpoint, where a number is none that may be."""
        if not bool(good.all()):
            prefix = self.layer.source + self.layer.linear.out[part].source
            raise CheckpointError(f"{name} of {prefix} hold {values[~good][0].item():g}, which must be {allowed}", fix=fix)


_ABSENT = torch.iinfo(torch.int32).min  # no group, no size
_WHERE_ABSENT = {"g_idx": _ABSENT, "weight_shape": _ABSENT, "pre_quant_scale": 1.0, "spare_bias": 0.0}


def fill_absent(parameters: dict[str, Tensor]) -> None:
    """Write into the parameters of optional tensors what their absence means."""
    for name, value in _WHERE_ABSENT.items():
        if name in parameters:
            parameters[name].fill_(value)
