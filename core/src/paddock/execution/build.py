"""One device's runner from a Plan: model, weights, pages. The Plan decides everything but how many pages there is room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn

from paddock import axes, layers, log
from paddock.checkpoint.load import load
from paddock.config import DUMMY, EXACT_SUMS, FP8_ATTENTION
from paddock.errors import PlanError
from paddock.execution.kvcache import allocate_kv
from paddock.execution.memory import NOTHING_LOADED, Loaded
from paddock.execution.rehearsal import Compilers, compile_ahead, compilers
from paddock.execution.runner import Runner, SmallSteps
from paddock.execution.sampling_ops import SAMPLING_OP_NAMES, SamplingOps
from paddock.execution.sizing import LargestStep, pages_with_room, run_largest
from paddock.layers import unquantized
from paddock.layers.parameters import torch_dtype
from paddock.planning import kv_scales, rebuild
from paddock.planning.hardware import GIB
from paddock.planning.ledger import small_step_bytes
from paddock.planning.plan import Plan
from paddock.plugins import resolve as imported

Progress = Callable[[int, int], None]


def build_runner(plan: Plan, folder: Path, *, device: torch.device, progress: Progress | None = None) -> Runner:
    """Return the runner of a whole model on one device: weights loaded, pages allocated.

    On a GPU the largest step is run first, so that the pages take what is really left; on a CPU they are the plan's.
    """
    ahead = compilers(plan, device) if device.type == "cuda" else []
    needs = rebuild.attention_needs(plan)
    backend: layers.AttentionBackend = imported(plan.attention.factory)(needs, device)
    with _room_for(f"the {_gib(plan.weight_bytes)} GiB of weights", device):
        model = build_model(plan, backend, device)
        fill_model(plan, model, folder, device, progress=progress)
    ops = SamplingOps.bind(_implementations(plan, SAMPLING_OP_NAMES))
    loaded, num_pages = NOTHING_LOADED, plan.num_pages
    if device.type == "cuda":
        loaded = _run_largest(ahead, plan, cast(layers.Model, model), backend, ops, device)
        num_pages = _pages_with_room(plan, device)
        if plan.asked.kv_cache_memory_bytes is not None and num_pages < plan.num_pages:
            log.get_logger().warning("fewer_pages_than_asked", pages=num_pages, asked=plan.num_pages)
    small_steps = _small_steps(plan)
    padding = 0 if small_steps is SmallSteps.AS_THEY_COME else 1
    runner = Runner.of(
        plan,
        cast(layers.Model, model),
        _allocate(plan, num_pages + padding, device),
        backend,
        device=device,
        sampling_ops=ops,
        small_steps=small_steps,
        loaded=loaded,
        buffer_bytes=_buffer_bytes(plan),
    )
    log.get_logger().info(
        "kv_cache_sized",
        pages=num_pages,
        planned=plan.num_pages,
        tokens=num_pages * plan.page_size,
        gib=_gib(num_pages * plan.ledger.page_bytes),
    )
    return runner


def _buffer_bytes(plan: Plan) -> int:
    return small_step_bytes(
        table=rebuild.weight_table(plan),
        shard=rebuild.shard(plan),
        dtype=plan.dtype,
        vocab_size=plan.vocab_size,
        sequences=plan.max_num_seqs,
    )


def _small_steps(plan: Plan) -> SmallSteps:
    """Return how small steps run: captured where the plan says so; else padded all the same where they could be."""
    if plan.graphs:
        return SmallSteps.CAPTURED
    can = plan.hardware.device == "cuda" and plan.attention.graph_capturable
    return SmallSteps.PADDED if can else SmallSteps.AS_THEY_COME


def _allocate(plan: Plan, num_pages: int, device: torch.device) -> list[layers.LayerKV]:
    needs = rebuild.attention_needs(plan)
    return allocate_kv(
        num_layers=plan.num_layers,
        num_pages=num_pages,
        page_size=plan.page_size,
        num_kv_heads=needs.num_kv_heads,
        head_dim=needs.head_dim,
        dtype=plan.kv_cache_dtype,
        device=device,
    )


def _run_largest(
    ahead: Compilers,
    plan: Plan,
    model: layers.Model,
    backend: layers.AttentionBackend,
    ops: SamplingOps,
    device: torch.device,
) -> Loaded:
    """Run the largest step over a page that is thrown away, and return what it took; raise PlanError where not even that fits.

    Kernels that the first steps need are compiled before it, all at once.
    """
    torch.cuda.empty_cache()  # what loading needed beside the weights goes back, or no page could have it
    weight_bytes = torch.cuda.memory_allocated(device)
    step = LargestStep.of(plan)
    with _room_for(f"weights and a step of {step.tokens} tokens, {step.sequences} sequences", device):
        compile_ahead(ahead, plan, model, backend, ops, _allocate(plan, 2, device), _small_steps(plan))
        torch.cuda.reset_peak_memory_stats(device)
        started = time.monotonic()
        run_largest(model, backend, _allocate(plan, 1, device), ops, step, device)
        torch.cuda.synchronize(device)
    workspace_bytes = torch.cuda.max_memory_allocated(device) - weight_bytes
    torch.cuda.reset_peak_memory_stats(device)
    seconds = round(time.monotonic() - started, 2)
    unused_bytes = torch.cuda.memory_reserved(device) - weight_bytes - workspace_bytes
    log.get_logger().info(
        "largest_step_run", tokens=step.tokens, gib=_gib(workspace_bytes), unused_gib=_gib(unused_bytes), seconds=seconds
    )
    return Loaded(weight_bytes=weight_bytes, workspace_bytes=workspace_bytes)


@contextmanager
def _room_for(what: str, device: torch.device) -> Iterator[None]:
    """Turn too little memory into a PlanError that says for what."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"{device} has too little memory for {what}: less is free than when the plan was made",
            fix="free it of other programs, lower max_num_batched_tokens or max_num_seqs, or use more GPUs or fewer bits",
        ) from error


def _pages_with_room(plan: Plan, device: torch.device) -> int:
    return pages_with_room(
        plan.ledger,
        available_bytes=plan.hardware.available_bytes,
        asked_bytes=plan.asked.kv_cache_memory_bytes,
        device=device,
    )


def build_model(plan: Plan, backend: layers.AttentionBackend, device: torch.device) -> nn.Module:
    """Return the model with its parameters allocated on `device`, not yet filled."""
    scheme = rebuild.scheme(plan)
    method = unquantized.method if plan.quantization is None else imported(plan.quantization.method)

    def method_for(path: str, linear: axes.Linear) -> layers.LinearMethod:
        return cast(layers.LinearMethod, method(scheme, path, linear))

    builder = layers.Builder(
        rebuild.weight_table(plan),
        method_for=method_for,
        ops=_ops(plan),
        backend=backend,
        dtype=torch_dtype(plan.dtype),
        device=device,
        max_model_len=plan.max_model_len,
        fp8_attention=plan.attention_compute == FP8_ATTENTION,
    )
    model: nn.Module = imported(plan.model.build)(rebuild.parsed_config(plan), builder)
    return model


def _ops(plan: Plan) -> layers.Ops:
    """Return the plan's ops; where sums of FP8 products are to be fast, that product is the one that models call."""
    ops = layers.Ops.bind(_implementations(plan, layers.OP_NAMES))
    return ops if plan.fp8_accumulation == EXACT_SUMS else ops.with_fast_sums()


def _implementations(plan: Plan, names: Collection[str]) -> dict[str, object]:
    """Return the plan's implementations of the named ops."""
    return {spec.op: imported(spec.implementation) for spec in plan.ops if spec.op in names}


def fill_model(plan: Plan, model: nn.Module, folder: Path, device: torch.device, *, progress: Progress | None = None) -> None:
    """Load the weights, or with load format `dummy` draw them, and bring them into their final layout."""
    started = time.monotonic()
    if plan.asked.load_format == DUMMY:
        layers.randomise(model, torch.Generator(device).manual_seed(plan.asked.seed))
    else:
        unread = (*rebuild.weight_table(plan).ignored, *kv_scales.UNREAD)
        load(folder, layers.targets(model), ignored_suffixes=unread, progress=progress)
    layers.finalise(model)
    model.eval()
    seconds = time.monotonic() - started
    log.get_logger().info(
        "weights_ready", load_format=plan.asked.load_format, gib=_gib(plan.weight_bytes), seconds=round(seconds, 2)
    )


def _gib(size: int) -> float:
    return round(size / GIB, 2)
