"""What FP8 arithmetic in attention costs in quality, beside 16-bit arithmetic over the same FP8 keys and values.

    python -m tests.bench.attention_quality MODEL [--text FILE] [--windows N] [--window TOKENS]

The plain model, the model with FP8 keys and values, and that with `attention_compute` fp8 run through Paddock in float32 over the
same windows; scales of keys and values are 1, queries have one a token and head. Printed are perplexities, their growth over the
one that a row is held against, the relative RMS error of all logits, the share of tokens with the same first choice and the mean
KL divergence.

`--text` is a UTF-8 file, or `generated`: each window sampled from the plain model at temperature 1, seeded with its number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from paddock.config import FP8_ATTENTION
from paddock.errors import PaddockError
from paddock.evaluation.texts import token_ids, windows
from paddock.quantize.text import read_text
from tests.bench.fp8_quality import GENERATED, Settings, generated, opened
from tests.bench.int4_quality import Sums, logits_of

PLAIN, KV, ATTENTION = "plain", "FP8 keys and values", "and FP8 arithmetic"
PAIRS = ((PLAIN, KV), (PLAIN, ATTENTION), (KV, ATTENTION))  # what is held against what


def measured(model: Path, settings: Settings) -> dict[tuple[str, str], Sums]:
    """Return what each pair gives; raise PaddockError for a model or a text with which nothing can be measured."""
    found = {pair: Sums() for pair in PAIRS}
    with ExitStack() as stack:
        engines = {
            PLAIN: stack.enter_context(opened(model, settings)),
            KV: stack.enter_context(opened(model, settings, kv=True)),
            ATTENTION: stack.enter_context(opened(model, settings, kv=True, attention_compute=FP8_ATTENTION)),
        }
        plain = engines[PLAIN]
        if settings.text == GENERATED:
            cut = generated(plain, settings)
        else:
            cut = windows(token_ids(plain, read_text(settings.text).words), settings.window, limit=settings.windows)
        for ids in cut:
            logits = {name: logits_of(llm, ids) for name, llm in engines.items()}
            for (against, name), sums in found.items():
                sums.add(logits[name], logits[against], torch.tensor(ids[1:]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a plain checkpoint")
    parser.add_argument("--text", default=GENERATED, metavar="FILE", help="(%(default)s)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--window", type=int, default=255, metavar="TOKENS", help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        found = measured(options.model, Settings(text=options.text, windows=options.windows, window=options.window))
    except PaddockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| computes | held against | perplexity | growth | error of logits | same first choice | KL, nats |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(sums.row(name, against) for (against, name), sums in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
