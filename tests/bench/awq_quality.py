"""What the recipe `awq` costs in quality, beside the plain model, AutoAWQ's own search and NVIDIA ModelOpt's own.

    python -m tests.bench.awq_quality MODEL --group-size N [--text FILE] [--windows N] [--samples N]
        [--weights NAME...] [--reference autoawq modelopt] [--tasks NAME... --limit N] [--keep DIR] [--dtype NAME] [--device NAME]

Held to the plain model over windows of text that calibration never read, as `tests.bench.fp8_quality` does and with its choice of
texts; `--tasks` also asks multiple-choice questions. All rows are computed in `--dtype` by Paddock's engine: weights that a tool
made are given to it as a plain checkpoint of them (`tests.bench.int4_references`). Only ModelOpt's W4A8, which rounds inputs
by a scale of its own, runs through transformers, in float32, and is held to transformers' plain model. Below the table each row
of Paddock is held to the tools' rows that compute alike, over the same windows in pairs.

Every checkpoint of Paddock is computed as W4A16 and, where its layout has a word for it, as W4A8: their weights are the same.
`--weights` names layouts, with `plain-rounding:` before one the recipe without its searches. `--keep` leaves the
checkpoints in a folder and takes those that are there already.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attrs import field, frozen

from paddock import LLM
from paddock.config import EngineConfig
from paddock.errors import PaddockError
from paddock.evaluation import TASKS, choices, compare, read_documents
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from paddock_quant_awq.recipes import layer
from paddock_quant_awq.recipes.chosen import W4A8, W4A16
from tests.bench import int4_references, modelopt_simulation
from tests.bench.fp8_quality import HELD_OUT, WINDOW, Settings, Texts, context_of, opened, read
from tests.bench.quality_rows import Row, further

OURS = "paddock"
PLAIN_ROUNDING = "plain-rounding:"
LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"format": "compressed-tensors", "zero_points": True},
    "compressed-tensors-symmetric": {"format": "compressed-tensors", "zero_points": False},
    "autoawq": {"format": "autoawq"},
    "modelopt": {"format": "modelopt"},
}
COMPUTED = {layout: (W4A16,) if layout == "autoawq" else (W4A16, W4A8) for layout in LAYOUTS}


@frozen(kw_only=True)
class Int4Settings:
    """What is measured: `weights` of ours, `references`, and the first `limit` documents of `tasks`."""

    texts: Settings
    group_size: int | None
    weights: tuple[str, ...] = tuple(LAYOUTS)
    references: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int = 100
    clip_tokens: int = int4_references.AUTOAWQ_CLIP_TOKENS


@frozen(kw_only=True)
class Int4Row:
    """One way to make and compute a model: `quality` is how far it is from the plain one, its recipe how the weights are made.

    `accuracies` are shares of documents answered rightly, one a task, None where they were not asked.
    """

    computes: str
    quality: Row
    accuracies: tuple[float | None, ...] = field(default=())


@contextmanager
def without_searches() -> Iterator[None]:
    """Leave weights unscaled, and round each group by its own range."""
    with (
        mock.patch.object(layer, "candidates", lambda x_mean_I, w_mean_I: iter([torch.ones_like(x_mean_I)])),
        mock.patch.object(layer, "best_parts", return_value=None),
    ):
        yield


def table(model: Path, settings: Int4Settings, folder: Path) -> Iterator[Int4Row]:
    """Yield the rows; checkpoints are made in `folder`, where they are not there yet.

    Raises PaddockError for a model, a text or an option with which nothing can be measured.
    """
    with opened(model, settings.texts) as plain:
        texts = read(plain, settings.texts)
        row = partial(measured, plain, model=model.name, texts=texts, settings=settings)
        yield row(plain, library=OURS, weights="as they are", computes=settings.texts.dtype)
        for weights in settings.weights:
            made = ours(model, folder / f"paddock-{weights}", settings, weights)
            for computes in COMPUTED[weights.removeprefix(PLAIN_ROUNDING)]:
                with opened(made, settings.texts, int4_compute=computes) as found:
                    yield row(found, library=OURS, weights=weights, computes=computes)
        for name in settings.references:
            out = folder / f"reference-{name}"
            assert settings.group_size is not None, "the references are told their groups"
            if not out.exists():
                auto = name == "autoawq"  # which chooses its device itself
                options: dict[str, Any] = {"clip_tokens": settings.clip_tokens} if auto else {"device": settings.texts.device}
                int4_references.MAKERS[name](model, out, texts.calibration_NL, settings.group_size, **options)
            with opened(out, settings.texts) as found:
                yield row(found, library=name, weights="its own search", computes=W4A16)
    if "modelopt" in settings.references:
        yield simulated(model, texts, settings)


def ours(model: Path, out: Path, settings: Int4Settings, weights: str) -> Path:
    """Return `out` with a checkpoint of the recipe in it; a finished one that is there is left."""
    if (out / "config.json").exists():
        return out
    options = QuantizeOptions(
        recipe="awq",
        out=out,
        group_size=settings.group_size,
        calibration=settings.texts.calibration,
        samples=settings.texts.samples,
        sequence_length=settings.texts.window,
        **LAYOUTS[weights.removeprefix(PLAIN_ROUNDING)],
    )
    with without_searches() if weights.startswith(PLAIN_ROUNDING) else nullcontext():
        quantize(EngineConfig(model=str(model), device=settings.texts.device), options, progress=False)
    return out


def measured(
    plain: LLM, found: LLM, *, model: str, texts: Texts, settings: Int4Settings, library: str, weights: str, computes: str
) -> Int4Row:
    """Return how near an engine comes to the plain one."""
    compared = [compare(plain, found, ids, window=settings.texts.window) for ids in texts.windows]
    return Int4Row(
        computes=computes,
        quality=Row.of(compared, model=model, library=library, recipe=weights, kv=settings.texts.dtype),
        accuracies=tuple(
            choices(found, task, read_documents(task).documents, limit=settings.limit).accuracy for task in settings.tasks
        ),
    )


def simulated(model: Path, texts: Texts, settings: Int4Settings) -> Int4Row:
    """Return the row of ModelOpt's simulation of W4A8, its groups as ours, through transformers."""
    assert settings.group_size is not None, "the references are told their groups"
    device = settings.texts.device
    plain = int4_references.loaded(model, device)
    found = int4_references.modelopt_simulated(
        model, texts.calibration_NL, settings.group_size, "W4A8_AWQ_BETA_CFG", device=device
    )
    quality = modelopt_simulation.row(
        plain, found, texts.windows, name=model.name, library="modelopt", recipe="its own search, simulated", kv="float32"
    )
    return Int4Row(computes=W4A8, quality=quality, accuracies=(None,) * len(settings.tasks))


def printed(rows: Sequence[Int4Row], tasks: Sequence[str]) -> str:
    """Return the rows as a table of Markdown, and below it how Paddock's differ from the tools' that compute alike."""
    heads = ["library", "weights", "computes", "perplexity", "growth", "same first choice", "KL, nats", "largest KL", *tasks]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * (len(heads) - 3))} |"]
    said = [
        f"growth of {ours.quality.recipe} as {ours.computes} is {further(ours.quality, theirs.quality)} "
        f"from that of {theirs.quality.library}, ± one standard error over {len(ours.quality.windows)} windows"
        for ours in rows
        for theirs in rows
        if ours.quality.library == OURS != theirs.quality.library and ours.computes == theirs.computes
    ]
    return "\n".join([*lines, *map(line, rows), *([""] if said else []), *said])


def line(row: Int4Row) -> str:
    """Return a row as a line of the table; the growth is ± its standard error over windows."""
    found = row.quality
    figures = [f"{found.perplexity:.4f}", str(found.growth), f"{found.top1:.4f}", f"{found.kl:.5f}", f"{found.kl_max:.3f}"]
    answers = ["" if share is None else f"{share:.3f}" for share in row.accuracies]
    return f"| {' | '.join([found.library, found.recipe, row.computes, *figures, *answers])} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    given = parsed(arguments)
    rows = []
    try:
        settings = Int4Settings(
            texts=Settings(
                calibration=given.calibration,
                text=given.text,
                windows=given.windows,
                window=given.window or min(WINDOW, context_of(given.model) - 1),
                samples=given.samples,
                dtype=given.dtype,
                device=given.device,
            ),
            group_size=given.group_size,
            weights=tuple(given.weights),
            references=tuple(given.reference),
            tasks=tuple(given.tasks),
            limit=given.limit,
            clip_tokens=given.autoawq_clip_tokens,
        )
        with tempfile.TemporaryDirectory(prefix="paddock-awq-quality-") as scratch:
            for row in table(given.model, settings, given.keep or Path(scratch)):
                print(line(row), file=sys.stderr, flush=True)
                rows.append(row)
    except PaddockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(printed(rows, settings.tasks))
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--group-size", type=int, required=True, metavar="N", help="inputs that share a scale")
    weights = [*LAYOUTS, *(f"{PLAIN_ROUNDING}{layout}" for layout in LAYOUTS)]
    parser.add_argument(
        "--weights", nargs="*", choices=weights, default=list(LAYOUTS), help="of Paddock's (default: of every layout)"
    )
    parser.add_argument("--reference", nargs="+", choices=tuple(int4_references.MAKERS), default=[], help="other tools to run")
    tokens = int4_references.AUTOAWQ_CLIP_TOKENS
    parser.add_argument(
        "--autoawq-clip-tokens", type=int, default=tokens, metavar="N", help="it clips by (%(default)s, its own choice)"
    )
    parser.add_argument("--text", default=HELD_OUT, metavar="FILE", help="held-out, generated or a file (%(default)s)")
    parser.add_argument("--calibration", default="default", metavar="FILE", help="text to calibrate on (default: Paddock's own)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="how many windows are scored (%(default)s)")
    parser.add_argument("--window", type=int, metavar="TOKENS", help=f"of each (default: {WINDOW}, or the context less 1)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="sequences of a window's length to calibrate on")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=[], help="multiple-choice sets to ask")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="documents of each (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the checkpoints here, and take those that are here")
    parser.add_argument("--dtype", default="float32", help="what all but ModelOpt's W4A8 computes in (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
