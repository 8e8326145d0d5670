"""A recipe: what it is given of a plain checkpoint, and what it makes of it.

The core reads a layer, runs the calibration text through it, writes what the recipe made of it and forgets it, so no more than
one layer is on the device. A recipe keeps numbers from layer to layer, never tensors of the layers.

T tokens, I input features, O output features, E model size, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from attrs import field, frozen
from torch import Tensor

from paddock import axes


@frozen(eq=False, kw_only=True)
class PlainLinear:
    """A linear of a layer as it is stored: `weights` [O, I] of each part by checkpoint prefix (`model.layers.3.mlp.up_proj`).

    `biases` [O] are by the same prefixes, empty for a linear without.
    """

    declared: axes.Linear
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor] = field(factory=dict)


@frozen(eq=False, kw_only=True)
class PlainVector:
    """A norm of a layer as it is stored, at checkpoint prefix `path`: its weight [E] and its bias [E], None where it has none."""

    declared: axes.Vector
    path: str
    weight_E: Tensor
    bias_E: Tensor | None = None


@frozen(eq=False, kw_only=True)
class PlainLayer:
    """A layer: its linears and norms by name in the weight table, and the checkpoint prefix of its attention block, if any.

    `run_with(weights)` runs a bounded sample of the calibration sequences through the layer again, with other weights [O, I] in
    place of those of the named checkpoint prefixes, and returns the layer's output [T, E]; None where nothing is calibrated.
    """

    index: int
    linears: Mapping[str, PlainLinear]
    vectors: Mapping[str, PlainVector] = field(factory=dict)
    attention_source: str = ""
    run_with: Callable[[Mapping[str, Tensor]], Tensor] | None = None


@frozen(kw_only=True)
class RecipeInputs:
    """What a recipe is made for: `dtype` is the one the plain checkpoint is stored in; `kv_cache_dtype` None for no KV scales.

    The others are what the user asked for, of the options the recipe's `RecipeSpec` says it reads; None leaves them to it.
    """

    table: axes.WeightTable = field(repr=False)
    dtype: str
    kv_cache_dtype: str | None = None
    group_size: int | None = None
    scheme: str | None = None
    format: str | None = None
    tp_compatible: int | None = None
    zero_points: bool | None = None


class LayerWork(Protocol):
    """A recipe's work on one layer: everything is seen first, then the tensors are asked for, once."""

    def see_input(self, linear: str, x_TI: Tensor) -> None:
        """Take note of inputs of the linear of that name in the weight table, on the device."""

    def see_kv(self, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Take note of keys, rotated, and values."""

    def tensors(self) -> Mapping[str, Tensor | None]:
        """Return the checkpoint tensors of the layer that are new or replaced, by name; all others are copied as they are.

        None leaves one out. Raises CheckpointError where what was seen cannot be quantised.
        """


class Recipe(Protocol):
    """What `RecipeSpec.create` returns, for one run."""

    @property
    def calibrated(self) -> bool:
        """Return whether it wants to see activations; if not, no text is read and nothing is run."""

    def begin(self, layer: PlainLayer) -> LayerWork:
        """Return the work on a layer."""

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return the JSON files to write, by name: config.json, made of the source's, and others a format wants."""
