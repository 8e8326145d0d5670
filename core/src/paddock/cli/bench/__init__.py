"""`paddock bench`: how fast a model answers, how soon, and how near its kernels come to the limit; every figure defined."""

from __future__ import annotations

import click

from paddock.cli.bench import chart, kernels, speed, startup, table

__all__ = ["command"]


@click.group(name="bench")
def command() -> None:
    """Measure how fast MODEL answers, how soon it starts, and how fast kernels are.

    Prompts are uniform random token ids; sampling is greedy; end-of-text is ignored, so that every request gives exactly OSL
    tokens; prefix caching is off; short runs warm up before the timed ones. --load-format dummy measures with random weights,
    from config.json alone. Where the device is known, figures come with their share of the roof: what it could give at best.
    """


for each in (speed.throughput, speed.latency, startup.startup, kernels.kernels, chart.chart, table.table):
    command.add_command(each)
