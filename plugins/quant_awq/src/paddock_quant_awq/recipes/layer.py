"""AWQ on one layer: what its linears were given is kept, then scales are searched, folded, ranges searched, weights rounded.

T tokens, I inputs, O outputs, R rows of a sample, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from attrs import field, frozen
from torch import Tensor

from paddock.quantize.recipe import PlainLayer, PlainLinear
from paddock_quant_awq.recipes.folding import Folded, shared
from paddock_quant_awq.recipes.groups import Rows, ScaleGroup
from paddock_quant_awq.recipes.layouts import Layout, Stored, static_scales
from paddock_quant_awq.recipes.rounding import Rounded
from paddock_quant_awq.recipes.search import best_parts, best_scale, candidates, output_error, weight_means
from paddock_quant_awq.recipes.seen import SeenInputs, require_finite

_UNCUT = frozenset({"q", "k", "qkv"})  # parts whose product, the attention scores, a softmax sharpens (AutoAWQ)


@frozen(eq=False, kw_only=True)
class AwqLayerWork:
    """A layer whose linears are all quantised. `dtype` is that of the checkpoint's plain tensors."""

    layer: PlainLayer
    groups: tuple[ScaleGroup, ...]
    layout: Layout
    dtype: torch.dtype
    _seen: dict[str, SeenInputs] = field(factory=dict)

    def see_input(self, linear: str, x_TI: Tensor) -> None:
        """Take note of inputs of a linear."""
        self._seen.setdefault(linear, SeenInputs()).see(x_TI)

    def see_kv(self, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Keys and values are left alone."""

    def tensors(self) -> Mapping[str, Tensor | None]:
        """Return the weights in 4 bits with their scales, and the norms and biases that were divided."""
        for linear in self.layer.linears.values():
            for path, weight_OI in linear.weights.items():
                require_finite(weight_OI, f"the weights of {path}")
        plain_TE = self._run({}).float()
        folded = self._folded(plain_TE)
        rounded = self._rounded(folded)
        simple = {path: self.layout.rounding.rounded(weight_OI.float()) for path, weight_OI in self._weights.items()}
        if self._error(Folded(), simple, plain_TE) < self._error(folded, rounded, plain_TE):
            folded, rounded = Folded(), simple
        return self._stored(folded, rounded)

    @property
    def _weights(self) -> dict[str, Tensor]:
        """Return every weight of the layer by checkpoint prefix."""
        return {path: each for linear in self.layer.linears.values() for path, each in linear.weights.items()}

    def _linears(self, group: ScaleGroup) -> list[PlainLinear]:
        return [self.layer.linears[name] for name in group.linears]

    def _folded(self, plain_TE: Tensor) -> Folded:
        """Return the scales of all groups, folded; each is searched with all other weights plain."""
        folded = Folded()
        for group in self.groups:
            paths = [path for linear in self._linears(group) for path in linear.weights]
            if group.norm:
                error = partial(self._block_error, paths, plain_TE)
                scale_I = self._searched(group, error)
                if not bool((scale_I == 1).all()):
                    folded.into_norm(self.layer.vectors[group.norm], paths, scale_I, self.dtype)
            elif self.layout.keeps_factors:
                folded.into_factor(paths, self._searched(group, partial(self._own_error, group)), self.dtype)
            elif group.follows is not None:
                scale_I = self._searched(group, partial(self._own_error, group), group.follows)
                folded.into_rows(self.layer.linears[group.follows.linear], group.follows, paths, scale_I, self.dtype)
        return folded

    def _searched(self, group: ScaleGroup, error: Callable[[Tensor], float], rows: Rows | None = None) -> Tensor:
        """Return the best scale of a group; one that `rows` take is the same for all inputs that a row feeds."""
        linears = self._linears(group)
        what = f"the inputs of {next(iter(linears[0].weights))}"
        x_mean_I = self._seen[group.linears[0]].mean(what)
        w_mean_I = weight_means((each for linear in linears for each in linear.weights.values()), self.layout.rounding.group)
        if rows is not None:
            x_mean_I, w_mean_I = shared(x_mean_I, rows), shared(w_mean_I, rows)
        return best_scale(candidates(x_mean_I, w_mean_I), error)

    def _block_error(self, paths: list[str], plain_TE: Tensor, scale_I: Tensor) -> float:
        """Return the mean squared error of the layer's output with some weights scaled and rounded."""
        weights = self._weights
        return self._distance({path: self._as_rounded(weights[path], scale_I) for path in paths}, plain_TE)

    def _own_error(self, group: ScaleGroup, scale_I: Tensor) -> float:
        """Return the mean squared error of a group's own outputs, summed over its weights."""
        rows_RI = self._seen[group.linears[0]].rows()
        weights = [each.float() for linear in self._linears(group) for each in linear.weights.values()]
        return sum(output_error(self._as_rounded(weight_OI, scale_I) - weight_OI, rows_RI) for weight_OI in weights)

    def _as_rounded(self, weight_OI: Tensor, scale_I: Tensor) -> Tensor:
        return self.layout.rounding.rounded(weight_OI.float() * scale_I).meaning() / scale_I

    def _rounded(self, folded: Folded) -> dict[str, Rounded]:
        """Return every weight scaled and rounded by the ranges found."""
        found = {}
        for name, linear in self.layer.linears.items():
            rows_RI = self._seen[name].rows()
            for part, (path, weight_OI) in zip(linear.declared.out, linear.weights.items(), strict=True):
                scaled_OI = folded.scaled(path, weight_OI)
                seen_RI = rows_RI / folded.columns[path] if path in folded.columns else rows_RI
                parts_OG = best_parts(scaled_OI, seen_RI, self.layout.rounding, cuts=part.name not in _UNCUT)
                found[path] = self.layout.rounding.rounded(scaled_OI, parts_OG)
        return found

    def _error(self, folded: Folded, rounded: Mapping[str, Rounded], plain_TE: Tensor) -> float:
        """Return the mean squared error of the layer's output with all weights rounded."""
        dtype = next(iter(self._weights.values())).dtype
        meant = {path: folded.unscaled(path, each.meaning()).to(dtype) for path, each in rounded.items()}
        return self._distance(meant, plain_TE)

    def _distance(self, weights: Mapping[str, Tensor], plain_TE: Tensor) -> float:
        return float((self._run(weights).float() - plain_TE).square().mean(dtype=torch.float64))

    def _run(self, weights: Mapping[str, Tensor]) -> Tensor:
        assert self.layer.run_with is not None, "AWQ is calibrated"
        return self.layer.run_with(weights)

    def _stored(self, folded: Folded, rounded: Mapping[str, Rounded]) -> Stored:
        made: Stored = dict(folded.tensors)
        for path, each in rounded.items():
            require_finite(each.scales_OG, f"the scales of {path}")
            made |= self.layout.store(path, each)
        if self.layout.static_inputs:
            for name, linear in self.layer.linears.items():
                largest_I = self._seen[name].largest()
                column_I = folded.columns.get(next(iter(linear.weights)))
                largest = (largest_I if column_I is None else largest_I / column_I).amax()
                made |= static_scales(linear.weights, [rounded[path].meaning() for path in linear.weights], largest)
        return made
