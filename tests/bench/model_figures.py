"""The rows of docs/benchmarks/gpu-models.md and gpu-startup.md, each by its own command: python -m tests.bench.model_figures OUT.

Every row is a `paddock bench throughput` or `paddock bench startup` in a process of its own, with random weights of a published
shape, whose config.json is written for it: nothing is fetched. OUT gets ROW.json of each row that ended well, so that a call that
was cut off goes on where it stopped, and `paddock bench table OUT/*.json` makes the pages. A row that fails is said and the next
one runs. `--only WORD` takes the rows whose name has the word, `--list` prints the commands.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import frozen
from core.tests.planning.made import published

from tests.bench.recipe_ratio import Shape

FP8_KV = ("--kv-cache-dtype", "fp8")
KEPT = ("--keep-fp8-weights",)
FAST = ("--fp8-accumulation", "fast")
FURTHER = {"max_position_embeddings": 4096}
BLOCKS = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
}
STARTUP_LENGTH = 2048  # positions a request may have: the engine of a start-up is built for them


@frozen(kw_only=True)
class Row:
    """A row: its name, the model, the `paddock bench` command after the model, and what config.json says otherwise."""

    name: str
    model: str
    bench: str
    options: tuple[str, ...]
    folder: str
    config: dict[str, Any]

    def command(self, runs: int, commit: str | None) -> list[str]:
        """Return the command line after `paddock`."""
        said = ["--commit", commit] if commit else []
        return ["bench", self.bench, self.folder, "--load-format", "dummy", *self.options, "--runs", str(runs), "--json", *said]

    def write(self, scratch: Path) -> None:
        """Write the model's config.json where the command looks for it."""
        folder = scratch / self.folder
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(published(self.model) | self.config))


def throughput(name: str, model: str, sizes: str, *options: str, kind: str = "", config: dict[str, Any] | None = None) -> Row:
    """Return the row of a workload REQUESTSxISL/OSL, of a `kind` of the model where config.json says something else."""
    requests, lengths = sizes.split("x")
    shape = Shape.of(lengths)
    given = ("--tokenizer", "none", "--requests", requests, "--isl", str(shape.isl), "--osl", str(shape.osl))
    length = ("--max-model-len", str(shape.length))
    return Row(
        name=name,
        model=model,
        bench="throughput",
        options=(*given, *length, *options),
        folder=f"{model}-{kind}" if kind else model,
        config=config or {},
    )


def startup(name: str, model: str, cache: str, *options: str) -> Row:
    """Return the row of a model's start with an empty or a warm kernel cache."""
    given = ("--max-model-len", str(STARTUP_LENGTH), "--kernel-cache", cache, *options)
    return Row(name=name, model=model, bench="startup", options=given, folder=model, config={})


def _int4(compute: str) -> tuple[str, ...]:
    return (*FP8_KV, "--int4-compute", compute)


ROWS = (
    throughput("8b-1x128", "llama-3.1-8b", "1x128/128"),
    throughput("8b-256x512", "llama-3.1-8b", "256x512/512", "--ledger"),
    throughput("8b-fp8-1x128", "llama-3.1-8b-fp8", "1x128/128", *FP8_KV),
    throughput("8b-fp8-64x2048", "llama-3.1-8b-fp8", "64x2048/128", *FP8_KV),
    throughput("8b-fp8-64x2048-fast", "llama-3.1-8b-fp8", "64x2048/128", *FP8_KV, *FAST),
    throughput("8b-block-1x128", "llama-3.1-8b", "1x128/128", *FP8_KV, kind="block", config=BLOCKS),
    throughput("8b-block-64x2048", "llama-3.1-8b", "64x2048/128", *FP8_KV, kind="block", config=BLOCKS),
    throughput("70b-fp8-1x128", "llama-3.1-70b-fp8", "1x128/128", *FP8_KV),
    throughput("70b-fp8-1x2048", "llama-3.1-70b-fp8", "1x2048/128", *FP8_KV),
    throughput("70b-fp8-1x2048-fast", "llama-3.1-70b-fp8", "1x2048/128", *FP8_KV, *FAST),
    throughput("70b-fp8-64x2048", "llama-3.1-70b-fp8", "64x2048/128", *FP8_KV),
    throughput("70b-fp8-64x2048-fast", "llama-3.1-70b-fp8", "64x2048/128", *FP8_KV, *FAST),
    throughput("70b-awq-1x128", "llama-3.1-70b-awq", "1x128/128", *_int4("w4a8")),
    throughput("70b-awq-1x2048", "llama-3.1-70b-awq", "1x2048/128", *_int4("w8a8")),
    throughput("70b-awq-1x2048-fast", "llama-3.1-70b-awq", "1x2048/128", *_int4("w8a8"), *FAST),
    throughput("70b-awq-1x2048-kept", "llama-3.1-70b-awq", "1x2048/128", *_int4("w8a8"), *KEPT, "--ledger"),
    throughput("70b-awq-1x2048-kept-fast", "llama-3.1-70b-awq", "1x2048/128", *_int4("w8a8"), *KEPT, *FAST),
    throughput("70b-awq-64x2048", "llama-3.1-70b-awq", "64x2048/128", *_int4("w8a8")),
    throughput("70b-awq-64x2048-fast", "llama-3.1-70b-awq", "64x2048/128", *_int4("w8a8"), *FAST),
    throughput("70b-awq-64x2048-kept", "llama-3.1-70b-awq", "64x2048/128", *_int4("w8a8"), *KEPT),
    throughput("70b-awq-64x2048-kept-fast", "llama-3.1-70b-awq", "64x2048/128", *_int4("w8a8"), *KEPT, *FAST),
    throughput("falcon-1x128", "falcon-180b-awq", "1x128/128", *_int4("w4a8")),
    throughput("falcon-64x128", "falcon-180b-awq", "64x128/128", *_int4("w8a8")),
    throughput("falcon-64x128-fast", "falcon-180b-awq", "64x128/128", *_int4("w8a8"), *FAST),
    throughput("falcon-256x128", "falcon-180b-awq", "256x128/128", *_int4("w8a8"), "--ledger"),
    throughput("falcon-128x2048", "falcon-180b-awq", "128x128/2048", *_int4("w8a8"), "--ledger", kind="4096", config=FURTHER),
    *(
        startup(f"start-{short}-{cache}", model, cache, *options)
        for short, model, options in (
            ("8b", "llama-3.1-8b", ()),
            ("70b-fp8", "llama-3.1-70b-fp8", FP8_KV),
            ("70b-awq", "llama-3.1-70b-awq", FP8_KV),
            ("falcon", "falcon-180b-awq", FP8_KV),
        )
        for cache in ("empty", "warm")
    ),
)


def chosen(words: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """Return the rows whose name has one of the words, all without words; raise click's error for a word no name has."""
    for word in words:
        if not any(word in row.name for row in rows):
            raise click.BadParameter(f"--only {word} names no row; there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not words or any(word in row.name for word in words)]


def measured(row: Row, runs: int, commit: str | None, out: Path) -> dict[str, Any] | str:
    """Run a row and return its report, written to `out` as a whole or not at all; where it failed, what it said last."""
    with tempfile.TemporaryDirectory(prefix="paddock-figures-") as scratch:
        row.write(Path(scratch))
        command = [sys.executable, "-m", "paddock", *row.command(runs, commit)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        return f"ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
    part = out / f"{row.name}.part"
    part.write_text(done.stdout)
    report: dict[str, Any] = json.loads(done.stdout)
    part.rename(out / f"{row.name}.json")
    return report


def figures(report: dict[str, Any]) -> str:
    """Return a report's main figures, and what of the roof they are where that is known."""
    if "output_tokens_per_second" not in report:
        return f"accepted {report['accepted_seconds']:.2f} s"
    speed, percent = report["output_tokens_per_second"], report["percent_of_roof"]
    return f"{speed:,.1f} tokens/s" + (f", {percent:.1f} % of the roof" if percent is not None else "")


def lines(rows: Sequence[Row], runs: int, commit: str | None, out: Path) -> Iterator[tuple[str, bool]]:
    """Yield a line for each row, and whether it is measured; what OUT has already is not measured again."""
    out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        kept = out / f"{row.name}.json"
        if kept.exists():
            yield f"{row.name}: {figures(json.loads(kept.read_text()))} (kept: remove {kept} to measure again)", True
            continue
        began = time.perf_counter()
        found = measured(row, runs, commit, out)
        took = f" in {time.perf_counter() - began:.0f} s"
        yield f"{row.name}: {found if isinstance(found, str) else figures(found)}{took}", not isinstance(found, str)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", "words", multiple=True, metavar="WORD", help="Only rows whose name has the word; repeatable.")
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each row; medians are shown.")
@click.option("--commit", help="The source, where it is no git checkout.")
@click.option("--list", "only_list", is_flag=True, help="Print the commands and run nothing.")
def main(out: Path, words: tuple[str, ...], runs: int, commit: str | None, only_list: bool) -> None:
    """Measure the rows into OUT, a line each."""
    rows = chosen(words)
    if only_list:
        for row in rows:
            click.echo(f"{row.name}: {shlex.join(['paddock', *row.command(runs, commit)])}")
        return
    right = True
    for line, well in lines(rows, runs, commit, out):
        click.echo(line)
        right &= well
    if not right:
        raise click.ClickException("some rows have no figure: what they said stands above")


if __name__ == "__main__":
    main()
