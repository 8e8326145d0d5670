"""Time of a model's layers in one decode graph, with ops left out one at a time: python -m tests.bench.layer_stack MODEL.

What an op costs among its neighbours is not what it costs alone: kernels start before the one ahead has ended, and one that
waits leaves memory to the next one's weights. So the layers are captured whole, then again with an op replaced by something free
(a view of its input), and the difference is its price. `--rows` sequences decode one token after `--context` others; weights
and keys are random; the model is a folder with config.json. Runs the ops and the attention that planning chooses; needs a GPU.
Of a model in FP8 the ops that emit it are left out; SiLU, which a product of few tokens may end in, is run behind it first, and
then left out there. `--layers` takes a part of a model's: a figure of it says so. Contexts that are no whole tiles of 64 keys,
nearly all, take attention in 16 bits longer than those that are.
"""

from __future__ import annotations

import json
import tempfile
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
from paddock.layers import TWO_DELTAS, AttentionBackend, AttentionInputs, Model, QuantizedActivation, takes, torch_dtype
from paddock.layers.reference import FP8
from paddock.planning import rebuild
from paddock.planning.fused_ops import PARTS_OF_PRODUCTS
from paddock.planning.plan import Plan
from paddock.plugins import resolve

CUDA = torch.device("cuda")
FREE = ("add_rms_norm", "add_layer_norm", "silu_mul", "gelu", "rope_and_cache", "cache_kv")
FREE_FP8 = (
    "rms_norm_fp8", "layer_norm_fp8", "silu_mul_fp8", "gelu_fp8", "quantize_fp8_static", "quantize_fp8_token", "rope_and_cache",
    "cache_kv",
)  # fmt: skip


class Free:
    """Ops that cost nothing: each returns a view of what it is given."""

    @staticmethod
    def add_rms_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return x_TE, delta_TE

    @staticmethod
    @takes(TWO_DELTAS)
    def add_layer_norm(x_TE: Tensor, delta_TE: Tensor, *rest: Any, more_TE: Tensor | None) -> tuple[Tensor, Tensor]:
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
    def rms_norm_fp8(
        x_TE: Tensor, delta_TE: Tensor | None, weight_E: Tensor, eps: float, scale: Tensor | None, *rest: Any
    ) -> tuple[Tensor, QuantizedActivation]:
        """Return x, and its bytes as FP8."""
        return x_TE, _bytes(x_TE, x_TE.shape[1], scale)

    @staticmethod
    @takes(TWO_DELTAS)
    def layer_norm_fp8(x_TE: Tensor, *rest: Any, more_TE: Tensor | None) -> tuple[Tensor, QuantizedActivation]:
        """Return x, and its bytes as FP8."""
        return x_TE, _bytes(x_TE, x_TE.shape[1], rest[-3])

    @staticmethod
    def silu_mul_fp8(gate_up_T2F: Tensor, scale: Tensor | None, *rest: Any) -> QuantizedActivation:
        """Return bytes of the gate as FP8."""
        return _bytes(gate_up_T2F, gate_up_T2F.shape[1] // 2, scale)

    @staticmethod
    def gelu_fp8(x_TF: Tensor, scale: Tensor | None, *rest: Any) -> QuantizedActivation:
        """Return bytes of x as FP8."""
        return _bytes(x_TF, x_TF.shape[1], scale)

    @staticmethod
    def quantize_fp8_static(x_TI: Tensor, scale: Tensor) -> QuantizedActivation:
        """Return bytes of x as FP8."""
        return _bytes(x_TI, x_TI.shape[1], scale)

    @staticmethod
    def quantize_fp8_token(x_TI: Tensor, *rest: Any) -> QuantizedActivation:
        """Return bytes of x as FP8."""
        return _bytes(x_TI, x_TI.shape[1], None)

    @staticmethod
    def rope_and_cache(q_THD: Tensor, *rest: Any) -> Tensor:
        """Return q, and write nothing."""
        return q_THD

    @staticmethod
    def cache_kv(*given: Any) -> None:
        """Write nothing."""


def _bytes(x_TX: Tensor, width: int, scale: Tensor | None) -> QuantizedActivation:
    """Return the first bytes of each row, as FP8, and where there is no scale some float32 of x: values are anybody's."""
    some_T1 = x_TX.view(torch.float32).flatten()[: len(x_TX), None]
    return QuantizedActivation(x_TX.view(FP8)[:, :width], some_T1 if scale is None else scale)


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


def apart(plan: Plan) -> Plan:
    """Return the plan with each product that would end in an activation left to its parts."""
    own = {op: f"paddock.layers.reference:{op}" for op in PARTS_OF_PRODUCTS}
    return evolve(plan, ops=tuple(evolve(op, implementation=own.get(op.op, op.implementation)) for op in plan.ops))


@frozen(eq=False, kw_only=True)
class Stack:
    """A model's plan and what all its variants share: a step of decodes over random pages."""

    plan: Plan
    laid: Laid

    def variants(self) -> Iterator[tuple[str, Plan, AttentionBackend]]:
        """Yield a name, the plan and the attention of the whole stack, then of each with something left out."""
        attention = resolve(self.plan.attention.factory)(rebuild.attention_needs(self.plan), CUDA)
        yield "all", self.plan, attention
        free = FREE if self.plan.quantization is None else FREE_FP8
        if self.plan.quantization is not None:
            yield "activations apart", apart(self.plan), attention
        for name in free:
            yield f"without {name}", without(apart(self.plan) if name == "silu_mul_fp8" else self.plan, name), attention
        yield "without attention", self.plan, NoAttention()
        yield "products alone", without(apart(self.plan), *free), NoAttention()

    def microseconds(self, plan: Plan, attention: AttentionBackend) -> float:
        """Return the time of a replay, embedding and head left out."""
        module = build_model(plan, attention, CUDA)
        fill_model(plan, module, Path(), CUDA)
        model, inputs = cast(Model, module), self.laid.inputs
        kv = [self.laid.case.make(layer)[1] for layer in range(plan.num_layers)]
        x_TE = torch.randn_like(model.embed(torch.zeros_like(inputs.positions_T)))
        return 1e6 * graph_seconds(lambda: model.forward(x_TE, evolve(inputs, prepared=attention.prepare(inputs)), kv), [()])


def _part(model: str, layers: int, folder: Path) -> str:
    """Return a folder that declares so many of the model's layers."""
    for file in Path(model).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return str(folder)


def stack_of(model: str, rows: int, context: int, layers: int | None, **options: Any) -> Stack:
    """Return the layers of a model, or so many of them, and a decode of `rows` sequences after `context` tokens."""
    given: dict[str, Any] = {"load_format": "dummy", "max_model_len": max(2048, context), **options}
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(EngineConfig.from_options(model if layers is None else _part(model, layers, Path(folder)), **given))
    needs = rebuild.attention_needs(plan)
    step = Step(name="decode", heads=(needs.num_heads, needs.num_kv_heads, needs.head_dim), decodes=(context,) * rows)
    draw = Draw(device=CUDA, dtype=torch_dtype(plan.dtype))
    kv_dtype = FP8 if plan.kv_cache_dtype == "fp8" else torch_dtype(plan.kv_cache_dtype)
    return Stack(plan=plan, laid=laid_out(step, page_size=plan.page_size, kv_dtype=kv_dtype, draw=draw))


@click.command()
@click.argument("model")
@click.option("--rows", type=int, default=1, show_default=True)
@click.option("--context", type=int, default=230, show_default=True)
@click.option("--layers", type=int, help="So many of the model's layers alone.")
@click.option("--kv-cache-dtype", default="auto", show_default=True)
@click.option("--int4-compute", default="auto", show_default=True)
@click.option("--attention-compute", default="plain", show_default=True)
def main(model: str, rows: int, context: int, layers: int | None, **options: str) -> None:
    """Print each variant's microseconds, in all and a layer, as JSON."""
    stack = stack_of(model, rows, context, layers, **options)
    with torch.inference_mode():
        for name, variant, attention in stack.variants():
            spent = stack.microseconds(variant, attention)
            line = {"variant": name, "microseconds": round(spent, 1), "a_layer": round(spent / stack.plan.num_layers, 2)}
            click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
