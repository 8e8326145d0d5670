"""What the recipes share in a layer: weights quantised part by part, and the largest inputs, keys and values seen.

T tokens, I input features, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import field, frozen
from torch import Tensor

from paddock.quantize.recipe import PlainLayer
from paddock_quant_fp8.recipes.scales import Largest

Quantise = Callable[[str, Tensor], dict[str, Tensor]]


@frozen(eq=False, kw_only=True)
class Fp8LayerWork:
    """A layer's linears that `chosen` names, each part's weight made by `quantise(checkpoint prefix, weight)`.

    With `static_inputs` each part gets the scale of what its linear was given, so parts of one product share it. `kv_names` are
    the full names of the K and the V scale, None where there are none; they are stored with `kv_shape`.
    """

    layer: PlainLayer
    chosen: frozenset[str]
    quantise: Quantise
    static_inputs: bool = False
    kv_names: tuple[str, str] | None = None
    kv_shape: tuple[int, ...] = ()
    _inputs: dict[str, Largest] = field(factory=dict)
    _kv: tuple[Largest, Largest] = field(factory=lambda: (Largest(), Largest()))

    def see_input(self, linear: str, x_TI: Tensor) -> None:
        """Take note of inputs of a linear that is quantised."""
        if self.static_inputs and linear in self.chosen:
            self._inputs.setdefault(linear, Largest()).see(x_TI)

    def see_kv(self, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Take note of keys and values."""
        if self.kv_names is not None:
            for largest, x_TKD in zip(self._kv, (k_TKD, v_TKD), strict=True):
                largest.see(x_TKD)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights in FP8 and all scales."""
        made: dict[str, Tensor] = {}
        for name in sorted(self.chosen):
            for path, weight_OI in self.layer.linears[name].weights.items():
                made |= self.quantise(path, weight_OI)
                if self.static_inputs:
                    made[f"{path}.input_scale"] = self._inputs[name].scale(f"the inputs of {path}")
        if self.kv_names is not None:
            for name, largest, what in zip(self.kv_names, self._kv, ("keys", "values"), strict=True):
                made[name] = largest.scale(f"the {what} of {self.layer.attention_source}").reshape(self.kv_shape)
        return made


def attention_kv_names(layer: PlainLayer) -> tuple[str, str]:
    """Return the KV scales' names as compressed-tensors and AutoFP8 write them: beside the projections."""
    return f"{layer.attention_source}.k_scale", f"{layer.attention_source}.v_scale"
