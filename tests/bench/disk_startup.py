"""Start-up from safetensors on a local disk, held to the disk's own speed: python -m tests.bench.disk_startup CONFIG_FOLDER.

Writes a whole checkpoint of random weights for a folder that holds config.json, measures how fast the disk reads it past the page
cache, then starts an engine as `paddock bench startup` does, each time with nothing of the files in the page cache. Prints one
JSON object a start and one at the end: medians, and what they depend on. `--layers` takes a part of a model: a figure of it says
so. Weights are drawn on the GPU where there is one, in a process of their own, so that the engine finds it free.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch

from paddock.assemble import collect, detect_hardware
from paddock.bench import conditions
from paddock.bench.measure import median_known
from paddock.bench.startup import Started, child_command, start
from paddock.cli.engine_options import engine_options
from paddock.config import DUMMY, EngineConfig
from paddock.errors import OptionError, PaddockError
from paddock.planning.issues import require_runnable
from paddock.planning.resolve import resolve
from tests.bench.disk_checkpoint import Checkpoint, check_room, described, finish, is_written, remove, with_layers, write_weights
from tests.bench.page_cache import DiskSpeed, cached_bytes, disk_speed, evict

FOLDER = "paddock-disk-startup"
STAYS_PERCENT = 1.0  # of the files in the page cache after eviction: more is said to be a warm start
DEFINITIONS = {
    "file_gb": "10**9 bytes: of the weight files",
    "disk_gb_per_s": "10**9 bytes a second: the disk's own speed, all files read once by 8 threads in blocks of 8 MiB",
    "write_gb_per_s": "10**9 bytes a second: drawing and writing the weights; null where they were there already",
    "cached_percent": "%: of the weight files in the page cache before eviction",
    "left_percent": "%: likewise, after it",
    "accepted_seconds": "s: from just before the process starts to its engine taking a request; median",
    "first_token_seconds": "s: from just before the process starts to the first token of that request; median",
    "weights_seconds": "s: of these, from the plan to the weights loaded; median",
    "load_seconds": "s: of these, reading the weights and bringing them into their final layout, as the engine logs it; median",
    "load_gb_per_s": "10**9 bytes a second: file_gb over load_seconds; median",
    "disk_percent": "%: load_gb_per_s of disk_gb_per_s; median",
}
MEDIANS = [name for name, text in DEFINITIONS.items() if text.endswith("; median")]


def write(model: str, layers: int | None, shard_bytes: int, folder: Path, options: Mapping[str, Any]) -> None:
    """Write the weight files on the device that an engine with these options runs on.

    Raises PaddockError, before anything is written, where such an engine cannot run.
    """
    source = with_layers(model, layers)
    config = EngineConfig.from_options(model, **options)
    plan = resolve(config, collect(config), detect_hardware(config), source)
    require_runnable(plan)
    write_weights(described(source, shard_bytes), folder, torch.device(plan.hardware.device))


def write_apart(checkpoint: Checkpoint, folder: Path, *what: Any) -> float | None:
    """Write the checkpoint in a process of its own, with `what` of `write`; return seconds, None where it was there already.

    Raises PaddockError where the folder holds something else or the disk has too little room. What is begun and not finished is
    removed.
    """
    if is_written(checkpoint, folder):
        return None
    check_room(checkpoint, folder)
    began = time.perf_counter()
    model, layers, shard_bytes, options = what
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(write, model, layers, shard_bytes, folder, options).result()
        finish(checkpoint, folder)
    except BrokenProcessPool as error:
        remove(checkpoint, folder)
        raise PaddockError(
            "the process that writes the weights was killed", fix="leave it more memory, or use --layers"
        ) from error
    except BaseException:
        remove(checkpoint, folder)
        raise
    return time.perf_counter() - began


def started(command: Sequence[str], files: Sequence[Path], disk: DiskSpeed) -> tuple[Started, dict[str, float | None]]:
    """Return a start with nothing of the files in the page cache, and its figures."""
    before = cached_bytes(files)
    evict(files)
    left = cached_bytes(files)
    run = start(command, os.environ)
    load_seconds = run.logged.get("weights", {}).get("seconds")
    speed = disk.nbytes / load_seconds / 1e9 if load_seconds else None
    known = run.figures()
    return run, {
        "cached_percent": 100 * before / disk.nbytes,
        "left_percent": 100 * left / disk.nbytes,
        **{name: known[name] for name in ("accepted_seconds", "first_token_seconds", "weights_seconds")},
        "load_seconds": load_seconds,
        "load_gb_per_s": speed,
        "disk_percent": None if speed is None else 100 * speed / disk.gb_per_s,
    }


def measured(checkpoint: Checkpoint, folder: Path, runs: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the medians of so many starts and what they depend on; each is printed as it ends."""
    files = [folder / name for name in checkpoint.heads]
    disk = disk_speed(files)
    command = child_command({**options, "model": str(folder)})
    rows, run = [], Started(seconds={})
    for number in range(1, runs + 1):
        run, row = started(command, files, disk)
        rows.append(row)
        click.echo(json.dumps({"run": number, **row}))
        if (row["left_percent"] or 0.0) > STAYS_PERCENT:
            click.echo(
                f"warning: {row['left_percent']:.0f} % of the files stayed in the page cache: no start from disk", err=True
            )
    return {
        "file_gb": disk.nbytes / 1e9,
        "files": len(files),
        "tensors": len(checkpoint.places),
        "disk_gb_per_s": disk.gb_per_s,
        "disk_read_with": disk.how,
        **{name: median_known([row[name] for row in rows]) for name in MEDIANS},
        "runs": rows,
        **{name: run.facts.get(name) for name in ("weight_bytes", "gpu", "plan", "versions")},
    }


@click.command()
@click.argument("config_folder")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="So many of the model's layers alone.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help=f"Where to write it [{FOLDER} in the temporary folder].")
@click.option("--shard-gib", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Of a weight file.")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Starts; medians are shown.")
@click.option("--keep", is_flag=True, help="Leave the files, for the next time; else they are removed, wherever they came from.")
@click.option("--commit", metavar="TEXT", help="What the source is [its git commit].")
@engine_options
def main(
    config_folder: str,
    layers: int | None,
    folder: Path | None,
    shard_gib: float,
    runs: int,
    keep: bool,
    commit: str | None,
    **options: Any,
) -> None:
    """Print each start, then their medians, as JSON."""
    given = {name: value for name, value in options.items() if value is not None}
    folder, shard_bytes = folder or Path(tempfile.gettempdir()) / FOLDER, int(shard_gib * (1 << 30))
    try:
        if given.get("load_format") == DUMMY:
            raise OptionError(f"--load-format is {DUMMY}, which reads no disk", fix="leave it out")
        given = {"tokenizer": "none", **given, "load_format": "safetensors"}
        checkpoint = described(with_layers(config_folder, layers), shard_bytes)
        click.echo(f"{checkpoint.nbytes / 1e9:.2f} GB in {len(checkpoint.heads)} files in {folder}", err=True)
        seconds = write_apart(checkpoint, folder, config_folder, layers, shard_bytes, given)
        try:
            report = measured(checkpoint, folder, runs, given)
        finally:
            if not keep:
                remove(checkpoint, folder)
    except PaddockError as error:
        raise click.ClickException(str(error)) from error
    speed = None if seconds is None else checkpoint.nbytes / seconds / 1e9
    summary = {"bench": "disk_startup", "model": config_folder, "layers": layers, "write_gb_per_s": speed, **report}
    command = shlex.join(["python", "-m", "tests.bench.disk_startup", *sys.argv[1:]])
    here = conditions.own_circumstances(commit=commit)
    click.echo(json.dumps({**summary, "definitions": DEFINITIONS, **here, "command": command}))


if __name__ == "__main__":
    main()
