"""What the recipe `awq` costs in quality, with plain rounding in the same layout beside it.

    python -m tests.bench.awq_quality MODEL --group-size N [--text FILE] [--windows N] [--samples N] [--format NAME...]

Held to the plain model over windows of text that calibration never read, as `tests.bench.fp8_quality` does and with its choice of
texts. Plain rounding is the recipe with its searches taken out: no scales, no clipping.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch

from paddock import LLM
from paddock.config import EngineConfig
from paddock.evaluation import compare
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from paddock_quant_awq.recipes import layer
from paddock_quant_awq.recipes.chosen import FORMATS
from tests.bench.fp8_quality import HELD_OUT, WINDOW, Settings, Texts, context_of, opened, read
from tests.bench.quality_rows import Row, printed

PLAIN, AWQ = "plain rounding", "awq"


@contextmanager
def without_searches() -> Iterator[None]:
    """Leave weights unscaled and unclipped."""
    with (
        mock.patch.object(layer, "candidates", lambda x_mean_I, w_mean_I: iter([torch.ones_like(x_mean_I)])),
        mock.patch.object(layer, "clip_limits", return_value=None),
    ):
        yield


def row(model: Path, plain: LLM, texts: Texts, settings: Settings, options: QuantizeOptions, *, rounding: str) -> Row:
    """Return how near a checkpoint comes to the plain model."""
    with without_searches() if rounding == PLAIN else nullcontext():
        quantize(EngineConfig(model=str(model), device=settings.device), options, progress=False)
    with opened(options.out, settings) as quantised:
        ids = [token for window in texts.windows for token in window]
        found = compare(plain, quantised, ids, window=settings.window)
    return Row(
        model=model.name,
        library=str(options.format),
        recipe=rounding,
        kv=settings.dtype,
        perplexity=found.perplexity_b,
        growth=found.perplexity_b / found.perplexity_a - 1,
        top1=found.top1,
        kl=found.kl,
        kl_max=found.kl_max,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--text", default=HELD_OUT)
    parser.add_argument("--calibration", default="default")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    settings = Settings(
        calibration=given.calibration,
        text=given.text,
        windows=given.windows,
        window=min(WINDOW, context_of(given.model) - 1),
        samples=given.samples,
        device=given.device,
    )
    rows = []
    with opened(given.model, settings) as plain, tempfile.TemporaryDirectory() as scratch:
        texts = read(plain, settings)
        for format_ in given.format:
            for rounding in (PLAIN, AWQ):
                options = QuantizeOptions(
                    recipe="awq",
                    out=Path(scratch) / f"{format_}-{rounding}",
                    format=format_,
                    group_size=given.group_size,
                    calibration=given.calibration,
                    samples=given.samples,
                    sequence_length=settings.window,
                )
                rows.append(row(given.model, plain, texts, settings, options, rounding=rounding))
                print(printed(rows[-1:]), file=sys.stderr, flush=True)
    print(printed(rows))


if __name__ == "__main__":
    main()
