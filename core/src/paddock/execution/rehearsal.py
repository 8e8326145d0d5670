"""Kernels compiled before the first step needs them: all of them at once, where one after the other would take far longer."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack

import torch

from paddock import log
from paddock.execution.runner import Runner, SmallSteps
from paddock.execution.sampling_ops import SamplingOps
from paddock.execution.sizing import LargestStep, run_largest
from paddock.layers.attention import AttentionBackend, LayerKV, Model
from paddock.planning.plan import Plan
from paddock.plugins import resolve as imported

Compilers = list[AbstractContextManager[None]]


def compilers(plan: Plan, device: torch.device) -> Compilers:
    """Return a context from every plugin the plan chose something of that can compile ahead; each may begin at once."""
    references = {plan.attention.compile_ahead, *(spec.compile_ahead for spec in plan.ops)}
    return [imported(reference)(device) for reference in sorted(filter(None, references))]


def compile_ahead(
    compilers: Compilers,
    plan: Plan,
    model: Model,
    backend: AttentionBackend,
    ops: SamplingOps,
    kv: list[LayerKV],
    small_steps: SmallSteps,
) -> None:
    """Have the kernels compiled of the largest step and of small ones of every size, as far as plugins offer it.

    Those steps are taken once while the plugins launch nothing; what is torch's own runs, on values that nobody wrote: no token
    and no index is one of them. `kv` holds two pages a layer, the second padding's, that are thrown away.
    """
    if not compilers:
        return
    started, device = time.monotonic(), kv[0].k_pages_NPKD.device
    with ExitStack() as entered:
        for each in compilers:
            entered.enter_context(each)
        run_largest(model, backend, kv, ops, LargestStep.of(plan), device)  # first, for prefill takes the longest to compile
        if small_steps is not SmallSteps.AS_THEY_COME:
            padded = SmallSteps.PADDED  # nothing is captured: the steps ask for what those of the real runner will
            runner = Runner.of(plan, model, kv, backend, device=device, sampling_ops=ops, small_steps=padded)
            runner.rehearse()
            runner.close()
            del runner  # with its memory, which pages are to take
    log.get_logger().info("kernels_ready", seconds=round(time.monotonic() - started, 2))
