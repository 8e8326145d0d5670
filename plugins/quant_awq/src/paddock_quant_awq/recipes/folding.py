"""Where the inverse of a scale goes: into a norm, into the rows of a linear before, or into a tensor of its own.

Each is rounded to the dtype it is stored in first, and the weights are multiplied by what that became, so that nothing is lost.

I inputs, O outputs, P rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attrs import field, frozen
from torch import Tensor

from paddock.quantize.recipe import PlainLinear, PlainVector
from paddock_quant_awq.recipes.groups import Rows


@frozen(eq=False, kw_only=True)
class Folded:
    """By checkpoint prefix of a weight: what its columns are multiplied with [I], what its rows are divided by [O].

    `tensors` are those of the checkpoint that are new or changed for it.
    """

    columns: dict[str, Tensor] = field(factory=dict)
    rows: dict[str, Tensor] = field(factory=dict)
    tensors: dict[str, Tensor] = field(factory=dict)

    def into_norm(self, vector: PlainVector, paths: Iterable[str], scale_I: Tensor, dtype: torch.dtype) -> None:
        """Divide a norm's weight and bias."""
        weight_I, ones_I = vector.weight_E.float(), torch.ones_like(scale_I)
        divided_I = (weight_I / scale_I).to(dtype)
        usable_I = divided_I.isfinite() & (divided_I != 0)
        exact_I = torch.where(usable_I, weight_I / divided_I.float(), torch.where(weight_I == 0, scale_I, ones_I))
        self.tensors[f"{vector.path}.weight"] = torch.where(usable_I, divided_I, weight_I.to(dtype))
        if vector.bias_E is not None:
            self.tensors[f"{vector.path}.bias"] = (vector.bias_E.float() / exact_I).to(dtype)
        self.columns.update(dict.fromkeys(paths, exact_I))

    def into_rows(self, linear: PlainLinear, rows: Rows, paths: Iterable[str], scale_I: Tensor, dtype: torch.dtype) -> None:
        """Divide rows of a linear, which is quantised after, and their bias; `scale_I` is `shared` by what they feed."""
        index = [each.name for each in linear.declared.out].index(rows.part)
        source = list(linear.weights)[index]
        scale_P = scale_I.view(-1, rows.copies, rows.unit)[:, 0].flatten()
        self.rows[source] = scale_P
        if source in linear.biases:
            self.tensors[f"{source}.bias"] = (linear.biases[source].float() / scale_P).to(dtype)
        self.columns.update(dict.fromkeys(paths, scale_I))

    def into_factor(self, paths: Iterable[str], scale_I: Tensor, dtype: torch.dtype) -> None:
        """Write what the inputs are multiplied with beside the weights."""
        factor_I = (1 / scale_I).to(dtype)
        factor_I = torch.where(factor_I.isfinite() & (factor_I > 0), factor_I, torch.ones_like(factor_I))
        for path in paths:
            self.tensors[f"{path}.pre_quant_scale"] = factor_I
            self.columns[path] = 1 / factor_I.float()

    def scaled(self, path: str, weight_OI: Tensor) -> Tensor:
        """Return a plain weight as it is to be rounded, in float32."""
        scaled_OI = weight_OI.float()
        if path in self.columns:
            scaled_OI = scaled_OI * self.columns[path]
        return scaled_OI / self.rows[path].unsqueeze(1) if path in self.rows else scaled_OI

    def unscaled(self, path: str, scaled_OI: Tensor) -> Tensor:
        """Return what a weight does in the layer as it was before anything was folded."""
        if path in self.rows:
            scaled_OI = scaled_OI * self.rows[path].unsqueeze(1)
        return scaled_OI / self.columns[path] if path in self.columns else scaled_OI


def shared(values_I: Tensor, rows: Rows) -> Tensor:
    """Return values of inputs [I], each the mean of those of all inputs that the same row feeds."""
    pieces_NCU = values_I.view(-1, rows.copies, rows.unit)
    return pieces_NCU.mean(1, keepdim=True).expand_as(pieces_NCU).flatten() if rows.copies > 1 else values_I
