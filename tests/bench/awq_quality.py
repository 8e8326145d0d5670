"""What the recipe `awq` costs in perplexity, with plain rounding in the same layout beside it.

`python -m tests.bench.awq_quality MODEL --group-size 64 [--format autoawq] [--samples 8] [--out DIR]`. Both are calibrated and
measured on the default text: its last fifth, which calibration never reads, in windows of up to 2,048 tokens. Plain rounding is
the recipe with its searches taken out: no scales, no clipping.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from paddock.config import EngineConfig
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from paddock_quant_awq.recipes import layer

ANY = 1e9  # a gate that measures and refuses nothing


@contextmanager
def without_searches() -> Iterator[None]:
    """Leave weights unscaled and unclipped."""
    with (
        mock.patch.object(layer, "candidates", lambda x_mean_I, w_mean_I: iter([torch.ones_like(x_mean_I)])),
        mock.patch.object(layer, "clip_limits", lambda *arguments: None),
    ):
        yield


def measured(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Return perplexities and seconds of one run."""
    options = QuantizeOptions(
        recipe="awq",
        out=out,
        group_size=arguments.group_size,
        format=arguments.format,
        samples=arguments.samples,
        gate=ANY,
    )
    started = time.monotonic()
    gate = quantize(EngineConfig(model=arguments.model, device=arguments.device), options).gate
    found = {side: gate[side]["perplexity"] for side in ("before", "after")}
    return {**found, "growth": gate["growth"], "tokens": gate["after"]["tokens"], "seconds": round(time.monotonic() - started)}


def main() -> None:
    """Print one JSON line for `awq` and one for plain rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--format")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="where the two checkpoints are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        with without_searches():
            print(json.dumps({"rounding": "plain", **measured(arguments, folder / "plain")}), flush=True)
        print(json.dumps({"rounding": "awq", **measured(arguments, folder / "awq")}), flush=True)


if __name__ == "__main__":
    main()
