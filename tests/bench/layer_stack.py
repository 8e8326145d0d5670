"""Time of a model's layers in one decode graph, with ops left out one at a time: python -m tests.bench.layer_stack MODEL.

What an op costs among its neighbours is not what it costs alone: kernels start before the one ahead has ended, and one that
waits leaves memory to the next one's weights. So the layers are captured whole, then again with an op replaced by something free
(a view of its input), and the difference is its price. `--rows` sequences decode one token after `--context` others; weights
and keys are random; the model is a folder with config.json. Runs the ops and the attention that planning chooses; needs a GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock import EngineConfig, layers
from paddock.assemble import plan as planned
from paddock.execution.build import fill_model
from paddock.execution.kvcache import allocate_kv
from paddock.layers import AttentionBackend, AttentionInputs, LayerKV
from paddock.layers.unquantized import method
from paddock.planning import rebuild
from paddock.planning.plan import Plan
from paddock.plugins import resolve

CUDA = torch.device("cuda")
REPLAYS = 25
FREE: dict[str, Callable[..., Any]] = {
    "add_rms_norm": lambda x_TE, delta_TE, weight_E, eps: (x_TE, delta_TE),
    "add_layer_norm": lambda x_TE, delta_TE, weight_E, bias_E, eps: (x_TE, delta_TE),
    "silu_mul": lambda gate_up_T2F: gate_up_T2F[:, : gate_up_T2F.shape[1] // 2],
    "gelu": lambda x_TF: x_TF,
    "rope_and_cache": lambda q_THD, *rest: q_THD,
    "cache_kv": lambda *given: None,
}


class NoAttention:
    """A backend that returns its queries."""

    def prepare(self, inputs: AttentionInputs) -> None:
        """Prepare nothing."""

    def attend(self, q_THD: Tensor, *rest: Any) -> Tensor:
        """Return q."""
        return q_THD


@frozen(eq=False, kw_only=True)
class Stack:
    """A model's plan and what all its variants share: pages and a step of decodes."""

    plan: Plan
    kv: list[LayerKV]
    inputs: AttentionInputs

    def variants(self) -> Iterator[tuple[str, layers.Ops, AttentionBackend]]:
        """Yield a name, the ops and the attention of the whole stack, then of each with something left out."""
        found = {spec.op: resolve(spec.implementation) for spec in self.plan.ops if spec.op in layers.OP_NAMES}
        attention = resolve(self.plan.attention.factory)(rebuild.attention_needs(self.plan), CUDA)
        yield "all", layers.Ops.bind(found), attention
        for name, free in FREE.items():
            yield f"without {name}", layers.Ops.bind({**found, name: free}), attention
        yield "without attention", layers.Ops.bind(found), NoAttention()
        yield "products alone", layers.Ops.bind({**found, **FREE}), NoAttention()

    def microseconds(self, ops: layers.Ops, attention: AttentionBackend) -> float:
        """Return the time of a replay, embedding and head left out."""
        scheme = rebuild.scheme(self.plan)
        builder = layers.Builder(
            rebuild.weight_table(self.plan),
            method_for=lambda path, linear: method(scheme, path, linear),
            ops=ops,
            backend=attention,
            dtype=layers.torch_dtype(self.plan.dtype),
            device=CUDA,
            max_model_len=self.plan.max_model_len,
        )
        model = resolve(self.plan.model.build)(rebuild.parsed_config(self.plan), builder)
        fill_model(self.plan, model, Path(), CUDA)
        x_TE = torch.randn(len(self.inputs.seq_lens_S), model.embedding.weight.shape[1], device=CUDA).to(builder.dtype)

        def run() -> None:
            model.forward(x_TE, evolve(self.inputs, prepared=attention.prepare(self.inputs)), self.kv)

        return replayed(run)


def replayed(run: Callable[[], None]) -> float:
    """Return the median microseconds of a captured call."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    found = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * float(begin.elapsed_time(end)))
    return statistics.median(found)


def laid_out(plan: Plan, rows: int, context: int) -> Stack:
    """Return the stack with random keys and values, every sequence's pages its own."""
    needs, page_size = rebuild.attention_needs(plan), plan.page_size
    width = -(-context // page_size)
    kv = allocate_kv(
        num_layers=plan.num_layers,
        num_pages=rows * width,
        page_size=page_size,
        num_kv_heads=needs.num_kv_heads,
        head_dim=needs.head_dim,
        dtype=plan.kv_cache_dtype,
        device=CUDA,
    )
    for layer in kv:
        for pages in (layer.k_pages_NPKD, layer.v_pages_NPKD):
            pages.copy_(torch.randn(pages.shape, device=CUDA))
    tables_SM = torch.arange(rows * width, dtype=torch.int32, device=CUDA).view(rows, width)
    last_S = torch.full((rows,), context - 1, device=CUDA)
    inputs = AttentionInputs(
        positions_T=last_S,
        slots_T=tables_SM[:, -1].long() * page_size + last_S % page_size,
        query_start_S1=torch.arange(rows + 1, dtype=torch.int32, device=CUDA),
        seq_lens_S=(last_S + 1).int(),
        block_tables_SM=tables_SM,
        page_size=page_size,
        num_decodes=rows,
        max_query_len=1,
        max_seq_len=context,
    )
    return Stack(plan=plan, kv=kv, inputs=inputs)


@click.command()
@click.argument("model")
@click.option("--rows", type=int, default=1, show_default=True)
@click.option("--context", type=int, default=192, show_default=True)
def main(model: str, rows: int, context: int) -> None:
    """Print each variant's microseconds, in all and a layer, as JSON."""
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": max(2048, context)}
    plan = planned(EngineConfig.from_options(model, **options))
    stack = laid_out(plan, rows, context)
    with torch.inference_mode():
        for name, ops, attention in stack.variants():
            spent = stack.microseconds(ops, attention)
            line = {"variant": name, "microseconds": round(spent, 1), "a_layer": round(spent / plan.num_layers, 2)}
            click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
