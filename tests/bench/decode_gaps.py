"""What the GPU and the host do between decode steps: python -m tests.bench.decode_gaps MODEL [--batch 1 --batch 256].

A profile of the GPU's kernels gives the time nothing runs, in each step and in percent of it; the engine's own clock gives the
host's microseconds a step: scheduling, launching, committing, and waiting for tokens, which is the time it has to spare. Weights
are random; config.json is enough. A step goes from one reading of the embedding table to the next. `--kernels` tells what each
kernel adds to a step: the time from the end of whatever ended last before it, or the step's begin, to its own.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import click
from attrs import asdict, define, field, frozen
from torch.profiler import ProfilerActivity, profile

from paddock import LLM, EngineConfig, SamplingParams
from paddock.assemble import assemble
from paddock.bench import conditions
from paddock.execution.stats import StepStats
from paddock.plugins import ObserverSpec, hookimpl

ISL = 128
SETTLED = 10  # steps left out at either end: prefills, the capture of this size, and the last steps of the run
DEFINITIONS = {
    "batch": "1: requests that decode together",
    "step": "us: from one reading of the embedding table to the next, on the GPU's clock, under a profiler; median",
    "idle": "us: of a step, in which no kernel runs; median",
    "idle_percent": "%: idle over all steps",
    "schedule": "us: of the host, choosing what a step runs; median, without a profiler",
    "launch": "us: of the host, laying the step out and launching it; likewise",
    "commit": "us: of the host, giving requests their tokens; likewise",
    "wait": "us: of the host, for the tokens of the step before: what it has to spare; likewise",
}


@frozen(kw_only=True)
class Gaps:
    """Medians over the settled decode steps of one batch size, in microseconds."""

    batch: int
    step: float
    idle: float
    idle_percent: float
    schedule: float
    launch: float
    commit: float
    wait: float


@frozen(kw_only=True)
class Kernel:
    """How often a kernel runs in a step, and the microseconds it adds to one in all."""

    name: str
    times: float
    microseconds: float


@define(eq=False)
class Watcher:
    """A plugin that keeps every step's numbers until they are taken. A plan names its observer through `WATCHER`."""

    stats: list[StepStats] = field(factory=list)

    @hookimpl
    def paddock_observers(self) -> list[ObserverSpec]:
        """Return the observer."""
        return [ObserverSpec(name="decode_gaps", factory=f"{__name__}:WATCHER.observer")]

    def observer(self, plan: Any) -> Callable[[StepStats], None]:
        """Return what is called with each step."""
        return self.stats.append

    def taken(self) -> list[StepStats]:
        """Return the steps since this was last asked for."""
        found = [*self.stats]
        self.stats.clear()
        return found


WATCHER = Watcher()


def measured(llm: LLM, watcher: Watcher, batch: int, steps: int) -> tuple[Gaps, list[Kernel]]:
    """Return the gaps of `batch` requests that decode together, and what each kernel adds to a step."""
    host, cuts, kernels = host_microseconds(llm, watcher, batch, steps), [], list[tuple[float, float, str]]()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        _run(llm, batch, steps)
    for event in trace.events():
        if event.device_type.name == "CUDA":
            kernels.append((event.time_range.start, event.time_range.end, event.name))
            cuts += [event.time_range.start] if "embed" in event.name else []
    cuts = sorted(cuts)[-steps + SETTLED : -SETTLED]
    busy = [(begin, end) for begin, end, name in kernels if not name.startswith("Mem")]
    idle = [_idle(busy, begin, end) for begin, end in pairwise(cuts)]
    lengths = [end - begin for begin, end in pairwise(cuts)]
    gaps = Gaps(
        batch=batch,
        step=statistics.median(lengths),
        idle=statistics.median(idle),
        idle_percent=100 * sum(idle) / sum(lengths),
        **host,
    )
    return gaps, added(kernels, cuts)


def added(kernels: list[tuple[float, float, str]], cuts: list[float]) -> list[Kernel]:
    """Return what each kernel, begun, ended and named, adds to the steps between cuts, most first; a copy counts as one."""
    spent: dict[str, list[float]] = {}
    step, before = -1, 0.0
    for end, name in sorted((end, name) for _, end, name in kernels):
        while step + 1 < len(cuts) and end > cuts[step + 1]:
            step, before = step + 1, max(before, cuts[step + 1])
        if 0 <= step < len(cuts) - 1:
            spent.setdefault(name, []).append(end - before)
            before = end
    steps = len(cuts) - 1
    found = [Kernel(name=name, times=len(each) / steps, microseconds=sum(each) / steps) for name, each in spent.items()]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


def _run(llm: LLM, batch: int, steps: int) -> None:
    prompts = [[(7 * i + 3 * j) % (llm.vocab_size - 2) + 2 for j in range(ISL)] for i in range(batch)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True), progress=False)


def host_microseconds(llm: LLM, watcher: Watcher, batch: int, steps: int) -> dict[str, float]:
    """Return the host's microseconds of a step, measured without the profiler; this run also captures the batch's size."""
    watcher.taken()
    _run(llm, batch, steps)
    settled = [stats for stats in watcher.taken() if not stats.num_prefills][SETTLED:-SETTLED]
    names = ("schedule", "launch", "commit", "wait")
    return {name: 1e6 * statistics.median(getattr(stats, f"{name}_seconds") for stats in settled) for name in names}


def _idle(kernels: list[tuple[float, float]], begin: float, end: float) -> float:
    """Return how long no kernel ran between two moments."""
    idle, busy_until = 0.0, begin
    for start, stop in sorted(kernel for kernel in kernels if kernel[1] > begin and kernel[0] < end):
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, stop)
    return idle + max(0.0, end - busy_until)


@click.command()
@click.argument("model")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 256), show_default=True)
@click.option("--steps", type=int, default=60, show_default=True)
@click.option("--max-model-len", type=int, default=2048, show_default=True)
@click.option("--kv-cache-dtype", default="auto", show_default=True)
@click.option("--int4-compute", default="auto", show_default=True)
@click.option("--kernels", "listed", is_flag=True, help="Say what each kernel adds to a step, too.")
@click.option("--commit", metavar="TEXT", help="What the source is [its git commit].")
def main(
    model: str,
    batches: tuple[int, ...],
    steps: int,
    max_model_len: int,
    kv_cache_dtype: str,
    int4_compute: str,
    listed: bool,
    commit: str | None,
) -> None:
    """Print the gaps of every batch size, and what they depend on, as one JSON object that `paddock bench table` reads."""
    options: dict[str, Any] = {"load_format": "dummy", "tokenizer": "none", "enable_prefix_caching": False}
    options |= {"kv_cache_dtype": kv_cache_dtype, "int4_compute": int4_compute}
    config = EngineConfig.from_options(model, max_model_len=max_model_len, observers=("decode_gaps",), **options)
    with LLM.from_engine(assemble(config, plugins=[WATCHER])) as llm:
        found = [measured(llm, WATCHER, batch, steps) for batch in batches]
        report = {
            "bench": "decode_gaps",
            "model": model,
            "rows": [asdict(gaps) for gaps, _ in found],
            **({"kernels": [[asdict(kernel) for kernel in kernels] for _, kernels in found]} if listed else {}),
            "definitions": DEFINITIONS,
            "gpu": conditions.gpus(),
            "plan": conditions.planned(llm.plan),
            **conditions.circumstances(distributions=conditions.distributions_of(llm.plan), commit=commit),
            "command": shlex.join(["python", "-m", "tests.bench.decode_gaps", *sys.argv[1:]]),
        }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
