"""From what a user asks for to an engine that runs: host, source, hardware, plan, model, pages, scheduler, runner.

One of the few places that know everybody. Everything is decided by the Plan; nothing here chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from paddock import axes, layers, log
from paddock.checkpoint.load import load
from paddock.checkpoint.source import open_source
from paddock.config import EngineConfig, read_environment
from paddock.errors import CheckpointError, OptionError
from paddock.execution.engine import Engine, Observer
from paddock.execution.kvcache import allocate_kv
from paddock.execution.launch import Launcher
from paddock.execution.runner import Runner
from paddock.layers import unquantized
from paddock.layers.parameters import torch_dtype
from paddock.planning import rebuild
from paddock.planning.hardware import GIB, Hardware, bandwidth_of, this_cpu
from paddock.planning.issues import require_runnable
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins import resolve as imported
from paddock.plugins.host import PluginHost
from paddock.plugins.registry import Registry
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler
from paddock.text.files import NO_TOKENIZER, read_text_files
from paddock.text.frontend import TextEngine

__all__ = ["assemble", "plan"]

Progress = Callable[[int, int], None]
DUMMY = "dummy"


def assemble(
    config: EngineConfig, *, plugins: Iterable[object] = (), autoload: bool = True, progress: Progress | None = None
) -> TextEngine:
    """Return an engine that runs, its Plan in `.plan`.

    `plugins` are used beside those installed, or alone unless `autoload`. `progress` is called with bytes read and bytes in
    all. Raises PaddockError: PlanError for what cannot run, with all its reasons; others for options, plugins and checkpoints.
    """
    started = time.monotonic()
    environment = read_environment()
    log.configure_once(environment.log_level)
    source = open_source(config.model, revision=config.revision, weights=config.load_format != DUMMY)
    registry = collect(config, plugins=plugins, autoload=autoload)
    plan = resolve(config, registry, detect_hardware(config), source, strict=environment.strict)
    _log_plan(plan)
    require_runnable(plan)
    text = read_text_files(source.folder, tokenizer=_tokenizer_folder(config), required=config.load_format != DUMMY)
    engine = TextEngine(
        build_engine(plan, source.folder, progress=progress),
        text,
        vocab_size=plan.vocab_size,
        max_model_len=plan.max_model_len,
        eos_ids=frozenset(plan.eos_token_ids),
        plan=plan,
    )
    log.get_logger().info("engine_ready", seconds=round(time.monotonic() - started, 2))
    return engine


def plan(config: EngineConfig, *, plugins: Iterable[object] = (), autoload: bool = True) -> Plan:
    """Return the Plan `assemble` would build from, errors and all, without reading weights."""
    source = open_source(config.model, revision=config.revision, weights=False)
    registry = collect(config, plugins=plugins, autoload=autoload)
    return resolve(config, registry, detect_hardware(config), source, strict=read_environment().strict)


def collect(config: EngineConfig, *, plugins: Iterable[object] = (), autoload: bool = True) -> Registry:
    """Return what is installed and given."""
    return PluginHost(plugins=tuple(plugins), autoload=autoload, prefer=dict(config.prefer), strict=config.strict).collect()


def detect_hardware(config: EngineConfig) -> Hardware:
    """Return what the engine may use of this machine: as many GPUs as were asked for (one when nothing was), or the CPU."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return this_cpu()
    if not torch.cuda.is_available():
        raise OptionError("device is 'cuda', but torch sees no GPU", fix="check the driver and that torch was built for CUDA")
    asked = (config.tensor_parallel_size or 1) * (config.pipeline_parallel_size or 1)
    count = min(asked, torch.cuda.device_count())
    properties = torch.cuda.get_device_properties(0)
    return Hardware(
        device="cuda",
        name=properties.name,
        count=count,
        memory_bytes=properties.total_memory,
        available_bytes=min(torch.cuda.mem_get_info(index)[0] for index in range(count)),
        compute_capability=(properties.major, properties.minor),
        bandwidth=bandwidth_of(properties.name),
    )


def build_engine(plan: Plan, folder: Path, *, progress: Progress | None = None) -> Engine:
    """Return the engine a runnable plan describes; `folder` holds the weights. A process that has but the plan may start here.

    Where the plan names parallel strategies, the runner of the outermost one is called as `runner(plan, folder)`.
    """
    log.configure_once(read_environment().log_level)
    if plan.parallel:
        launcher = cast(Launcher, imported(plan.parallel[0].runner)(plan, folder))
    else:
        launcher = build_runner(plan, folder, device=torch.device(plan.hardware.device), progress=progress)
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_queue=plan.asked.max_queue,
        enable_prefix_caching=plan.asked.enable_prefix_caching,
    )
    observers = tuple(cast(Observer, imported(spec.factory)(plan)) for spec in plan.observers)
    return Engine(Scheduler(limits), launcher, observers)


def build_runner(plan: Plan, folder: Path, *, device: torch.device, progress: Progress | None = None) -> Runner:
    """Return the runner of a whole model on one device: weights loaded, pages allocated."""
    needs = rebuild.attention_needs(plan)
    backend: layers.AttentionBackend = imported(plan.attention.factory)(needs, device)
    model = build_model(plan, backend, device)
    fill_model(plan, model, folder, device, progress=progress)
    kv = allocate_kv(
        num_layers=plan.num_layers,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        num_kv_heads=needs.num_kv_heads,
        head_dim=needs.head_dim,
        dtype=plan.kv_cache_dtype,
        device=device,
    )
    log.get_logger().info("kv_cache_sized", pages=plan.num_pages, tokens=plan.kv_tokens, gib=_gib(plan.ledger.kv_bytes))
    return Runner(
        cast(layers.Model, model),
        kv,
        backend,
        num_slots=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        vocab_size=plan.vocab_size,
        device=device,
        seed=plan.asked.seed,
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
        ops=layers.Ops.bind({spec.op: imported(spec.implementation) for spec in plan.ops}),
        backend=backend,
        dtype=torch_dtype(plan.dtype),
        device=device,
        max_model_len=plan.max_model_len,
    )
    model: nn.Module = imported(plan.model.build)(rebuild.parsed_config(plan), builder)
    return model


def fill_model(plan: Plan, model: nn.Module, folder: Path, device: torch.device, *, progress: Progress | None = None) -> None:
    """Load the weights, or with load format `dummy` draw them, and bring them into their final layout."""
    started = time.monotonic()
    if plan.asked.load_format == DUMMY:
        layers.randomise(model, torch.Generator(device).manual_seed(plan.asked.seed))
    else:
        load(folder, layers.targets(model), ignored_suffixes=rebuild.weight_table(plan).ignored, progress=progress)
    layers.finalise(model)
    model.eval()
    seconds = time.monotonic() - started
    log.get_logger().info(
        "weights_ready", load_format=plan.asked.load_format, gib=_gib(plan.weight_bytes), seconds=round(seconds, 2)
    )


def _tokenizer_folder(config: EngineConfig) -> str | None:
    """Return where the tokenizer is, None for the model's own folder; a hub id is fetched."""
    name = config.tokenizer
    if name is None or name == NO_TOKENIZER or Path(name).is_dir():
        return name
    try:
        return str(open_source(name, weights=False).folder)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer is {name!r}: {error.message}", fix=error.fix) from error


def _log_plan(plan: Plan) -> None:
    logger = log.get_logger()
    chosen = {choice.name: choice.value for choice in plan.choices if not choice.name.startswith("op ")}
    logger.info("plan_resolved", model_folder=plan.asked.model, hardware=str(plan.hardware), **chosen)
    for issue in plan.issues:
        if issue.level != "error":  # those are raised
            logger.log(30 if issue.level == "warning" else 20, issue.code, message=issue.message, fix=issue.fix)


def _gib(size: int) -> float:
    return round(size / GIB, 2)
