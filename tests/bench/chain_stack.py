"""Llama's layers with a decode's products in one launch, among attention and rotation: python -m tests.bench.chain_stack MODEL.

The layers of `layer_stack` are captured whole, as they are served, from o to down in one launch, and from o to the next layer's
q, k and v; what is served is timed first and last. MODEL is a folder with config.json of a Llama in FP8 with static scales; needs
a GPU. What comes out is compared with what is served.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from paddock.layers import AttentionInputs, LayerKV
from paddock.planning import rebuild
from paddock.plugins import resolve
from paddock.testing.oracle import relative_rms
from tests.bench.chain_candidate import MOST_TOKENS, Linear, Norm, launch_chain
from tests.bench.layer_stack import CUDA, Forward, served_forward, stack_of


def _linear(layer: Any) -> Linear:
    """Return a linear of FP8 rows and a static scale."""
    weight, scale, x_scale = (layer.get_parameter(name) for name in ("weight", "weight_scale", "input_scale"))
    return Linear(weight_OI=weight, scale_O1=scale, x_scale=x_scale)


def _norm(layer: Any) -> Norm:
    return Norm(weight_E=layer.weight, eps=layer.eps)


def chained(model: Any, x_TE: Tensor, inputs: AttentionInputs, kv: list[LayerKV], *, following: bool) -> Tensor:
    """Return the residual stream after the layers."""
    layers, delta_TE, qkv_TQ = list(model.layers), None, None
    for layer, after, layer_kv in zip(layers, [*layers[1:], None], kv, strict=True):
        if qkv_TQ is None:
            x_TE, h_TE = layer.attention_norm(x_TE, delta_TE)
            qkv_TQ = layer.qkv(h_TE)
        a = layer.attention(*layer.qkv.split(qkv_TQ), inputs, layer_kv)
        own = _linear(layer.o), _norm(layer.mlp_norm), _linear(layer.gate_up), _linear(layer.down)
        if following and after is not None:
            _, x_TE, qkv_TQ = launch_chain(a.values_TI, x_TE, *own, (_norm(after.attention_norm), _linear(after.qkv)))
        else:
            x_TE, delta_TE = launch_chain(a.values_TI, x_TE, *own)
            qkv_TQ = None
    assert delta_TE is not None, "no layers"
    return x_TE + delta_TE


FORWARDS: dict[str, Forward] = {
    "served": served_forward,
    "o to down": partial(chained, following=False),
    "o to the next q, k and v": partial(chained, following=True),
    "served again": served_forward,
}


@click.command()
@click.argument("model")
@click.option("--rows", type=click.IntRange(1, MOST_TOKENS), default=1, show_default=True)
@click.option("--context", type=int, default=192, show_default=True)
@click.option("--layers", type=int, help="So many of the model's layers alone.")
def main(model: str, rows: int, context: int, layers: int | None) -> None:
    """Print microseconds a layer of each, as JSON, and how far apart what comes out is from what is served."""
    stack = stack_of(model, rows, context, layers, kv_cache_dtype="fp8")
    backend = resolve(stack.plan.attention.factory)(rebuild.attention_needs(stack.plan), CUDA)
    with torch.inference_mode():
        seen: dict[str, Tensor] = {}
        for name, forward in FORWARDS.items():

            def kept(*given: Any, name: str = name, forward: Forward = forward) -> Tensor:
                seen[name] = forward(*given)
                return seen[name]

            torch.manual_seed(0)  # of what goes in
            spent = stack.microseconds(stack.plan, backend, kept) / stack.plan.num_layers
            apart = relative_rms(seen[name].float(), seen["served"].float())
            click.echo(json.dumps({"products": name, "microseconds_a_layer": round(spent, 2), "apart": apart}))


if __name__ == "__main__":
    main()
