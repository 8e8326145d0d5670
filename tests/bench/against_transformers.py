"""Batched throughput on a CPU: the same requests through Paddock and through transformers, side by side in one process.

`python tests/bench/against_transformers.py MODEL [--requests 16] [--isl 128] [--osl 64] [--dtype bfloat16 float32] [--runs 3]`

Prompts are uniform random token ids, greedy, end-of-sequence ignored. `equal`: every prompt has isl tokens, so that padding costs
transformers nothing. `mixed`: prompts of isl/4 to isl tokens, left-padded into one batch for transformers. Runs alternate; the
median counts. out tok/s = requests x osl / wall seconds, prefill included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Prompts = list[list[int]]


def main() -> None:
    """Measure and print one line a dtype and workload, and JSON with `--json`."""
    options = _options()
    rows = [row for dtype in options.dtype for row in _measure_dtype(options, dtype)]
    print(f"{'dtype':<10}{'prompts':<9}{'paddock tok/s':>15}{'transformers tok/s':>20}{'ratio':>8}")
    for row in rows:
        print(f"{row['dtype']:<10}{row['prompts']:<9}{row['paddock']:>15.1f}{row['transformers']:>20.1f}{row['ratio']:>8.2f}")
    best = {name: max(row[name] for row in rows if row["prompts"] == "equal") for name in ("paddock", "transformers")}
    print(f"each at its quicker dtype, equal prompts: {best['paddock'] / best['transformers']:.2f}x")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "machine": _machine()}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _machine() -> dict[str, Any]:
    versions = {name: version(name) for name in ("paddock", "torch", "transformers")}
    return {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _measure_dtype(options: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    draw = random.Random(0)
    lengths = {"equal": [options.isl] * options.requests}
    lengths["mixed"] = [draw.randint(options.isl // 4, options.isl) for _ in range(options.requests)]
    engines = {"paddock": _paddock(options, dtype), "transformers": _transformers(options, dtype)}
    rows = []
    for name, counts in lengths.items():
        prompts = [[draw.randrange(1000, 40000) for _ in range(count)] for count in counts]
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        for _ in range(options.runs):
            for engine, run in engines.items():
                seconds[engine].append(_seconds(run, prompts))
        speed = {engine: options.requests * options.osl / statistics.median(times) for engine, times in seconds.items()}
        rows.append({"dtype": dtype, "prompts": name, **speed, "ratio": speed["paddock"] / speed["transformers"]})
    return rows


def _seconds(run: Callable[[Prompts], int], prompts: Prompts) -> float:
    start = time.perf_counter()
    produced = run(prompts)
    seconds = time.perf_counter() - start
    assert produced % len(prompts) == 0, "every request gives the same number of tokens"
    return seconds


def _paddock(options: argparse.Namespace, dtype: str) -> Callable[[Prompts], int]:
    from paddock import LLM, SamplingParams

    llm = LLM(str(options.model), dtype=dtype, device="cpu", enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=options.osl, ignore_eos=True)

    def run(prompts: Prompts) -> int:
        return sum(len(output.token_ids) for output in llm.generate(prompts, params))

    run([[1, 2, 3]])
    return run


def _transformers(options: argparse.Namespace, dtype: str) -> Callable[[Prompts], int]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
    model.eval()

    def run(prompts: Prompts) -> int:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        limits = {"max_new_tokens": options.osl, "min_new_tokens": options.osl, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return int(model.generate(ids, attention_mask=mask, **limits)[:, width:].numel())

    run([[1, 2, 3]])
    return run


if __name__ == "__main__":
    main()
