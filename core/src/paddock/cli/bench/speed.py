"""`paddock bench throughput` and `paddock bench latency`: how fast a model answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paddock.cli.bench.figures import commit_option, defined, json_option, print_facts, print_figures, print_json
from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.session import Session
from paddock.cli.tables import show_table

if TYPE_CHECKING:
    from paddock.bench.measure import Run, Workload
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
    click.option("--ledger", is_flag=True, help="Show the bytes the plan predicted beside those measured."),
    commit_option,
    json_option,
    click.pass_obj,
)


def _bench_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_bench_options
def throughput(session: Session, /, model: str, as_json: bool, ledger: bool, commit: str | None, **options: Any) -> None:
    """All requests at once: how many tokens a second come out."""
    report, memory = _measured("throughput", session, model, commit=commit, options=options)
    _say(report, memory, as_json=as_json, ledger=ledger)


@click.command()
@_bench_options
def latency(session: Session, /, model: str, as_json: bool, ledger: bool, commit: str | None, **options: Any) -> None:
    """One request after another, each alone: how long one waits."""
    report, memory = _measured("latency", session, model, commit=commit, options=options)
    _say(report, memory, as_json=as_json, ledger=ledger)


def _measured(
    kind: str, session: Session, model: str, *, commit: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the report of the runs, and predicted beside measured memory."""
    from paddock.bench import ledgers, measure

    requests, isl, osl, runs, seed = (options.pop(name) for name in ("requests", "isl", "osl", "runs", "seed"))
    options["max_model_len"] = options["max_model_len"] or isl + osl
    work = measure.Workload(requests=requests, isl=isl, osl=osl, seed=seed, at_once=kind == "throughput")
    began = time.perf_counter()
    with open_llm(session, model, {**options, "enable_prefix_caching": False}) as llm:
        ready = time.perf_counter() - began
        measure.warm_up(llm, work)
        timed = [_timed(llm, work, number, runs) for number in range(runs)]
        memory = ledgers.ledger_report(llm.plan, llm.memory_use())
        report = {"bench": kind, "model": model, **work.described(), **_figures(llm, work, timed)}
        return {**report, "ready_seconds": round(ready, 2), **_facts(llm, commit)}, memory


def _figures(llm: LLM, work: Workload, timed: list[Run]) -> dict[str, Any]:
    from paddock.bench.against_roof import beside_roof
    from paddock.bench.measure import DEFINITIONS, summary

    figures = summary(timed)
    return {
        **figures,
        **beside_roof(llm.plan, work, figures["output_tokens_per_second"]),
        "runs": [run.figures() for run in timed],
        "definitions": defined(DEFINITIONS),
    }


def _facts(llm: LLM, commit: str | None) -> dict[str, Any]:
    from paddock.bench import conditions

    facts = conditions.circumstances(distributions=conditions.distributions_of(llm.plan), commit=commit)
    return {"gpu": conditions.gpus(), "plan": conditions.planned(llm.plan), **facts}


def _timed(llm: LLM, work: Workload, number: int, runs: int) -> Run:
    from paddock.bench import measure

    run = measure.timed_run(llm, work)
    if sys.stderr.isatty():
        click.echo(f"run {number + 1} of {runs}: {run.wall:.2f} s", err=True)
    return run


def _say(report: dict[str, Any], memory: dict[str, Any] | None, *, as_json: bool, ledger: bool) -> None:
    if as_json:
        print_json({**report, "ledger": memory} if ledger else report)
        return
    from paddock.bench.against_roof import RATES
    from paddock.bench.measure import DEFINITIONS

    how = "all at once" if report["at_once"] else "one after another"
    sizes = f"{report['requests']} requests, {how}, {report['isl']:g} tokens in, {report['osl']:g} out"
    click.echo(f"{report['bench']} of {report['model']}: {sizes}, median of {len(report['runs'])}")
    print_figures(DEFINITIONS, report, rates=RATES, share=report["percent_of_roof"])
    each = ", ".join(f"{run['output_tokens_per_second']:,.2f}" for run in report["runs"])
    click.echo(f"  output tokens/s of each run: {each}")
    click.echo(f"  roof: {_roof_line(report)}")
    plan = {key: value for key, value in (report["plan"] or {}).items() if key != "ops"}
    names = ("ready_seconds", "gpu", "versions", "commit", "date", "command")
    print_facts({"plan": plan or None, **{name: report[name] for name in names}})
    if ledger:
        _show_ledger(memory)


def _roof_line(report: dict[str, Any]) -> str:
    roof = report["roof"]
    if report["roof_tokens_per_second"] is None:
        return f"none, {roof['none_because']}"
    ceilings = roof["ceilings"]
    return (
        f"{report['roof_tokens_per_second']:,.1f} output tokens/s, by {ceilings['bytes_per_second'] / 1e12:.3g} TB/s of "
        f"{ceilings['name']} ({ceilings['source']})"
    )


def _show_ledger(memory: dict[str, Any] | None) -> None:
    if memory is None:
        click.echo("no plan, so no bytes were predicted", err=True)
        return
    rows = [
        (
            name,
            _mib(entry["predicted"]),
            _mib(entry["measured"]),
            _percent(entry["difference_percent"]),
            memory["definitions"][name],
        )
        for name, entry in memory["entries"].items()
    ]
    click.echo(f"\nbytes of {memory['bytes_of']}" + ("" if memory["measured"] else "; nothing was measured here"))
    show_table(("", "predicted MiB", "measured MiB", "difference", "what it is"), rows)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):,.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f} %"
