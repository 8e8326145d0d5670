"""Llama's layers with a decode's products in one launch, among attention and rotation: python -m tests.bench.chain_stack MODEL.

The layers of `layer_stack` are captured whole: as they are served, from o to down in one launch (FP8 alone), and from o to the
next layer's q, k and v; what is served is timed first and last. MODEL is a folder with config.json of a Llama in FP8 with static
scales, or in INT4 with `--int4-compute w4a8`; needs a GPU. What comes out is compared with what is served.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click
import torch
from attrs import evolve
from torch import Tensor

from paddock.layers import AttentionInputs, LayerKV
from paddock.planning import rebuild
from paddock.plugins import resolve
from paddock.testing.oracle import relative_rms
from tests.bench import chain_int4_candidate
from tests.bench.chain_candidate import MOST_TOKENS, Linear, Norm, chain_of, launch_chain
from tests.bench.chain_variants import cut
from tests.bench.layer_stack import CUDA, Forward, served_forward, stack_of


def _linear(layer: Any) -> Linear:
    """Return a linear of FP8 rows and a static scale."""
    weight, scale, x_scale = (layer.get_parameter(name) for name in ("weight", "weight_scale", "input_scale"))
    return Linear(weight_OI=weight, scale_O1=scale, x_scale=x_scale)


def _norm(layer: Any) -> Norm:
    return Norm(weight_E=layer.weight, eps=layer.eps)


def chained(
    model: Any,
    x_TE: Tensor,
    inputs: AttentionInputs,
    kv: list[LayerKV],
    *,
    following: bool,
    shared: bool = False,
    reads: bool = False,
) -> Tensor:
    """Return the residual stream after the layers of a model in FP8, whose tiles are cut as each product's or all `shared`."""
    layers, delta_TE, qkv_TQ = list(model.layers), None, None
    for layer, after, layer_kv in zip(layers, [*layers[1:], None], kv, strict=True):
        if qkv_TQ is None:
            x_TE, h_TE = layer.attention_norm(x_TE, delta_TE)
            qkv_TQ = layer.qkv(h_TE)
        a = layer.attention(*layer.qkv.split(qkv_TQ), inputs, layer_kv)
        o, gate_up, down = (_linear(each) for each in (layer.o, layer.gate_up, layer.down))
        behind = (_norm(after.attention_norm), _linear(after.qkv)) if following and after is not None else None
        chain = chain_of(len(x_TE), o, gate_up, down, behind and behind[1], x_TE.dtype)
        chain = evolve(cut(chain, shared=True) if shared else chain, reads=reads)
        found = launch_chain(a.values_TI, x_TE, o, _norm(layer.mlp_norm), gate_up, down, behind, chain)
        if behind is None:
            (x_TE, delta_TE), qkv_TQ = found, None
        else:
            _, x_TE, qkv_TQ = found
    assert delta_TE is not None, "no layers"
    return x_TE + delta_TE


def chained_int4(
    model: Any, x_TE: Tensor, inputs: AttentionInputs, kv: list[LayerKV], *, slots: int, depth: int = 1, reads: bool = False
) -> Tensor:
    """Return the residual stream after the layers of a model in INT4, the last of which runs op by op."""
    (first, *_), (*others, last), (*kvs, last_kv) = model.layers, model.layers, kv
    x_TE, h_TE = first.attention_norm(x_TE, None)
    qkv_TQ = first.qkv(h_TE)
    for layer, after, layer_kv in zip(others, list(model.layers)[1:], kvs, strict=True):
        a = layer.attention(*layer.qkv.split(qkv_TQ), inputs, layer_kv)
        weights = tuple(each.method._weight(each) for each in (layer.o, layer.gate_up, layer.down, after.qkv))
        chain = chain_int4_candidate.chain_of(len(x_TE), weights, slots=slots, depth=depth, reads=reads)
        norms = _norm(layer.mlp_norm), _norm(after.attention_norm)
        _, x_TE, qkv_TQ = chain_int4_candidate.launch_chain(a, x_TE, norms, weights, chain)
    attended = last.attention(*last.qkv.split(qkv_TQ), inputs, last_kv)
    x_TE, h_TE = last.mlp_norm(x_TE, last.o(attended))
    added_TE: Tensor = x_TE + last.down(last.silu.after(last.gate_up, h_TE))
    return added_TE


SERVED: dict[str, Forward] = {"served": served_forward}
FORWARDS: dict[str, Forward] = {
    **SERVED,
    "o to down": partial(chained, following=False),
    "o to the next q, k and v": partial(chained, following=True),
    "all tiles shared": partial(chained, following=True, shared=True),
    "all tiles shared, counts read": partial(chained, following=True, shared=True, reads=True),
    "served again": served_forward,
}
INT4_FORWARDS: dict[str, Forward] = {
    **SERVED,
    **{f"o to the next q, k and v, {slots} slots": partial(chained_int4, slots=slots) for slots in (6, 8, 9)},
    "9 slots, counts read": partial(chained_int4, slots=9, reads=True),
    "5 slots of two groups a team": partial(chained_int4, slots=5, depth=2),
    "served again": served_forward,
}


@click.command()
@click.argument("model")
@click.option("--rows", type=click.IntRange(1, MOST_TOKENS), default=1, show_default=True)
@click.option("--context", type=int, default=192, show_default=True)
@click.option("--layers", type=int, help="So many of the model's layers alone.")
@click.option("--int4-compute", default="auto", show_default=True)
def main(model: str, rows: int, context: int, layers: int | None, int4_compute: str) -> None:
    """Print microseconds a layer of each, as JSON, and how far apart what comes out is from what is served."""
    stack = stack_of(model, rows, context, layers, kv_cache_dtype="fp8", int4_compute=int4_compute)
    backend = resolve(stack.plan.attention.factory)(rebuild.attention_needs(stack.plan), CUDA)
    seen: dict[str, Tensor] = {}

    def kept(*given: Any, name: str, forward: Forward) -> Tensor:
        seen[name] = forward(*given)
        return seen[name]

    with torch.inference_mode():
        for name, forward in (FORWARDS if stack.plan.fp8_inputs_from is None else INT4_FORWARDS).items():
            torch.manual_seed(0)  # of what goes in
            spent = stack.microseconds(stack.plan, backend, partial(kept, name=name, forward=forward)) / stack.plan.num_layers
            apart = relative_rms(seen[name].float(), seen["served"].float())
            click.echo(json.dumps({"products": name, "microseconds_a_layer": round(spent, 2), "apart": apart}))


if __name__ == "__main__":
    main()
