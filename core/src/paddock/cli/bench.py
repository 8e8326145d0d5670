"""`paddock bench`: how fast a model answers, every figure defined."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.session import Session

if TYPE_CHECKING:
    from paddock.cli.measure import Run
    from paddock.llm import LLM

Command = TypeVar("Command", bound=Callable[..., object])

_OPTIONS = (
    click.argument("model"),
    click.option("--requests", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="How many requests."),
    click.option("--isl", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Tokens in, a request."),
    click.option("--osl", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Tokens out, a request."),
    click.option("--runs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs; medians are shown."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="S", help="Seed of the random prompts."),
    engine_options,
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.pass_obj,
)


def _bench_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group(name="bench")
def command() -> None:
    """Measure how fast MODEL answers.

    Prompts are uniform random token ids; sampling is greedy; end-of-text is ignored, so that every request gives exactly OSL
    tokens; prefix caching is off; a short run of as many requests warms up before the timed ones. --load-format dummy
    measures with random weights, from config.json alone.
    """


@command.command()
@_bench_options
def throughput(session: Session, /, model: str, as_json: bool, **options: Any) -> None:
    """All requests at once: how many tokens a second come out."""
    _bench("throughput", session, model, as_json=as_json, options=options)


@command.command()
@_bench_options
def latency(session: Session, /, model: str, as_json: bool, **options: Any) -> None:
    """One request after another, each alone: how long one waits."""
    _bench("latency", session, model, as_json=as_json, options=options)


def _bench(kind: str, session: Session, model: str, *, as_json: bool, options: dict[str, Any]) -> None:
    from paddock.cli import measure

    requests, isl, osl, runs, seed = (options.pop(name) for name in ("requests", "isl", "osl", "runs", "seed"))
    options["max_model_len"] = options["max_model_len"] or isl + osl
    began = time.perf_counter()
    with open_llm(session, model, {**options, "enable_prefix_caching": False}) as llm:
        startup = time.perf_counter() - began
        work = measure.Workload(requests=requests, isl=isl, osl=osl, seed=seed, at_once=kind == "throughput")
        measure.warm_up(llm, work)
        timed = [_timed(llm, work, number, runs) for number in range(runs)]
        report = measure.summary(timed)
        facts = _facts(llm, startup)
    if as_json:
        every = [run.figures() for run in timed]
        click.echo(json.dumps({"bench": kind, "model": model, **work.described(), **report, "runs": every, **facts}))
    else:
        _print(kind, model, work.described(), report, facts)


def _timed(llm: LLM, work: Any, number: int, runs: int) -> Run:
    from paddock.cli import measure

    run = measure.timed_run(llm, work)
    if sys.stderr.isatty():
        click.echo(f"run {number + 1} of {runs}: {run.wall:.2f} s", err=True)
    return run


def _facts(llm: LLM, startup: float) -> dict[str, Any]:
    """Return what the figures depend on: versions, device, types, start-up, and the command."""
    import platform
    from importlib.metadata import version

    plan = llm.plan
    return {
        "startup_seconds": round(startup, 2),
        "device": str(plan.hardware.name) if plan is not None else None,
        "dtype": plan.dtype if plan is not None else None,
        "kv_cache_dtype": plan.kv_cache_dtype if plan is not None else None,
        "versions": {"paddock": version("paddock"), "torch": version("torch"), "python": platform.python_version()},
        "command": shlex.join(["paddock", *sys.argv[1:]]),
    }


def _print(kind: str, model: str, work: dict[str, Any], report: dict[str, Any], facts: dict[str, Any]) -> None:
    from paddock.cli.measure import DEFINITIONS

    how = "all at once" if work["at_once"] else "one after another"
    click.echo(f"{kind} of {model}: {work['requests']} requests, {how}, {report['isl']:g} tokens in, {report['osl']:g} out")
    for name, (label, unit, meaning) in DEFINITIONS.items():
        value = report[name]
        click.echo(f"  {label:28}{'-' if value is None else f'{value:,.2f}':>12} {unit:9} {meaning}")
    for name, value in facts.items():
        shown = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        click.echo(f"  {name}: {shown}")
