"""From what a user asks for to an engine that runs: host, source, hardware, plan, model, pages, scheduler, runner.

One of the few places that know everybody. Everything is decided by the Plan; nothing here chooses.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from paddock import log
from paddock.checkpoint.source import open_source
from paddock.config import DUMMY, EngineConfig, read_environment
from paddock.errors import CheckpointError, OptionError
from paddock.execution.build import Progress, build_runner
from paddock.execution.engine import Engine, Observer
from paddock.execution.launch import Launcher
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
    tokens = build_engine(plan, source.folder, progress=progress)
    engine = TextEngine(
        tokens,
        text,
        vocab_size=plan.vocab_size,
        max_model_len=tokens.max_model_len,
        eos_ids=frozenset(plan.eos_token_ids),
        plan=plan,
        memory_use=tokens.memory_use,
        watch_prompts=tokens.watch_prompts,
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
        fix = "check the driver" if torch.version.cuda else f"install a torch built for CUDA: {torch.__version__} is not"
        raise OptionError("device is 'cuda', but torch sees no GPU", fix=fix)
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
    length = _length_with_room(plan, launcher.num_pages)
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=length,
        num_pages=launcher.num_pages,
        page_size=plan.page_size,
        max_queue=plan.asked.max_queue,
        enable_prefix_caching=plan.asked.enable_prefix_caching,
    )
    observers = tuple(cast(Observer, imported(spec.factory)(plan)) for spec in plan.observers)
    return Engine(Scheduler(limits), launcher, observers)


def _length_with_room(plan: Plan, num_pages: int) -> int:
    """Return the longest sequence the pages that there are really hold: the plan's, unless it was chosen by an estimate too high.

    A length that was asked for stays: where it does not fit the scheduler's limits say so.
    """
    held = num_pages * plan.page_size
    if plan.asked.max_model_len is not None or held >= plan.max_model_len:
        return plan.max_model_len
    log.get_logger().warning("max_model_len_shortened", planned=plan.max_model_len, max_model_len=held)
    return held


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
