"""Time of a model's layers in one decode graph, with ops left out one at a time: python -m tests.bench.layer_stack MODEL.

What an op costs among its neighbours is not what it costs alone: kernels start before the one ahead has ended, and one that
waits leaves memory to the next one's weights. So the layers are captured whole, then again with an op replaced by something free
(a view of its input), and the difference is its price. `--rows` sequences decode one token after `--context` others; weights
and keys are random; the model is a folder with config.json. Runs the ops and the attention that planning chooses; needs a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock import EngineConfig
from paddock.assemble import plan as planned
from paddock.bench.kernels.attention_cases import Laid, Step, laid_out
from paddock.bench.kernels.case import Draw
from paddock.bench.kernels.timing import graph_seconds
from paddock.execution.build import build_model, fill_model
from paddock.layers import AttentionBackend, AttentionInputs, Model, torch_dtype
from paddock.planning import rebuild
from paddock.planning.plan import Plan
from paddock.plugins import resolve

CUDA = torch.device("cuda")
FREE = ("add_rms_norm", "add_layer_norm", "silu_mul", "gelu", "rope_and_cache", "cache_kv")


class Free:
    """Ops that cost nothing: each returns a view of what it is given."""

    @staticmethod
    def add_rms_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return x_TE, delta_TE

    @staticmethod
    def add_layer_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return x_TE, delta_TE

    @staticmethod
    def silu_mul(gate_up_T2F: Tensor) -> Tensor:
        """Return the gate."""
        return gate_up_T2F[:, : gate_up_T2F.shape[1] // 2]

    @staticmethod
    def gelu(x_TF: Tensor) -> Tensor:
        """Return it."""
        return x_TF

    @staticmethod
    def rope_and_cache(q_THD: Tensor, *rest: Any) -> Tensor:
        """Return q, and write nothing."""
        return q_THD

    @staticmethod
    def cache_kv(*given: Any) -> None:
        """Write nothing."""


class NoAttention:
    """A backend that returns its queries."""

    def prepare(self, inputs: AttentionInputs) -> None:
        """Prepare nothing."""

    def attend(self, q_THD: Tensor, *rest: Any) -> Tensor:
        """Return q."""
        return q_THD


def without(plan: Plan, *names: str) -> Plan:
    """Return the plan with the named ops free."""
    free = (evolve(op, implementation=f"tests.bench.layer_stack:Free.{op.op}") if op.op in names else op for op in plan.ops)
    return evolve(plan, ops=tuple(free))


@frozen(eq=False, kw_only=True)
class Stack:
    """A model's plan and what all its variants share: a step of decodes over random pages."""

    plan: Plan
    laid: Laid

    def variants(self) -> Iterator[tuple[str, Plan, AttentionBackend]]:
        """Yield a name, the plan and the attention of the whole stack, then of each with something left out."""
        attention = resolve(self.plan.attention.factory)(rebuild.attention_needs(self.plan), CUDA)
        yield "all", self.plan, attention
        for name in FREE:
            yield f"without {name}", without(self.plan, name), attention
        yield "without attention", self.plan, NoAttention()
        yield "products alone", without(self.plan, *FREE), NoAttention()

    def microseconds(self, plan: Plan, attention: AttentionBackend) -> float:
        """Return the time of a replay, embedding and head left out."""
        module = build_model(plan, attention, CUDA)
        fill_model(plan, module, Path(), CUDA)
        model, inputs = cast(Model, module), self.laid.inputs
        kv = [self.laid.case.make(layer)[1] for layer in range(plan.num_layers)]
        x_TE = torch.randn_like(model.embed(torch.zeros_like(inputs.positions_T)))
        return 1e6 * graph_seconds(lambda: model.forward(x_TE, evolve(inputs, prepared=attention.prepare(inputs)), kv), [()])


@click.command()
@click.argument("model")
@click.option("--rows", type=int, default=1, show_default=True)
@click.option("--context", type=int, default=192, show_default=True)
def main(model: str, rows: int, context: int) -> None:
    """Print each variant's microseconds, in all and a layer, as JSON."""
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": max(2048, context)}
    plan = planned(EngineConfig.from_options(model, **options))
    needs = rebuild.attention_needs(plan)
    step = Step(name="decode", heads=(needs.num_heads, needs.num_kv_heads, needs.head_dim), decodes=(context,) * rows)
    draw = Draw(device=CUDA, dtype=torch_dtype(plan.dtype))
    laid = laid_out(step, page_size=plan.page_size, kv_dtype=torch_dtype(plan.kv_cache_dtype), draw=draw)
    stack = Stack(plan=plan, laid=laid)
    with torch.inference_mode():
        for name, variant, attention in stack.variants():
            spent = stack.microseconds(variant, attention)
            line = {"variant": name, "microseconds": round(spent, 1), "a_layer": round(spent / plan.num_layers, 2)}
            click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
