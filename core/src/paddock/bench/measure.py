"""What `paddock bench` measures, and how each figure is made from the times tokens came."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from attrs import evolve, frozen

from paddock.errors import PaddockError
from paddock.llm import LLM
from paddock.planning.padding import padded_sizes
from paddock.request import RequestOutput, SamplingParams

WARM_UP_ISL = 32  # tokens in of each request of the first warm-up, all at once
WARM_UP_LONG, WARM_UP_OSL = 2, 8  # requests of the second, as long as the timed ones, and tokens out of each

DEFINITIONS = {
    "wall_seconds": ("wall", "s", "from the first request given to the last token of the last one"),
    "output_tokens_per_second": ("output", "tokens/s", "tokens out of all requests / wall"),
    "total_tokens_per_second": ("total", "tokens/s", "tokens in and out of all requests / wall"),
    "requests_per_second": ("requests", "1/s", "requests / wall"),
    "ttft_median_ms": ("time to first token, median", "ms", "from a request given to its first token, waiting included"),
    "ttft_p99_ms": ("time to first token, p99", "ms", "the same, 99 % of requests are below"),
    "itl_median_ms": ("inter-token latency, median", "ms", "between a token and the next of its request, over all tokens"),
    "itl_p99_ms": ("inter-token latency, p99", "ms", "the same, 99 % of gaps are below"),
    "request_output_tokens_per_second": ("output of one request", "tokens/s", "its tokens / end to end, median over requests"),
    "e2e_median_ms": ("end to end, median", "ms", "from a request given to its last token"),
    "e2e_p99_ms": ("end to end, p99", "ms", "the same, 99 % of requests are below"),
}


@frozen(kw_only=True)
class Workload:
    """`requests` of `isl` random tokens in and `osl` out, all at once or one after another."""

    requests: int
    isl: int
    osl: int
    seed: int
    at_once: bool

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Return uniform random token ids, the same for the same seed."""
        draw = random.Random(self.seed)
        return [[draw.randrange(vocab_size) for _ in range(self.isl)] for _ in range(self.requests)]

    def described(self) -> dict[str, Any]:
        """Return what was asked for, as the report shows it."""
        return {
            "requests": self.requests,
            "asked_isl": self.isl,
            "asked_osl": self.osl,
            "seed": self.seed,
            "at_once": self.at_once,
        }


@frozen(kw_only=True)
class Run:
    """One timed run: seconds on the wall, and every request's output with its times."""

    wall: float
    outputs: tuple[RequestOutput, ...]

    def figures(self) -> dict[str, float | None]:
        """Return every figure of DEFINITIONS, and the tokens in and out a request really had."""
        tokens_in = sum(len(output.prompt_token_ids) for output in self.outputs)
        tokens_out = sum(len(output.token_ids) for output in self.outputs)
        times = [(output.timings.arrived, output.outputs[0].token_times) for output in self.outputs if output.timings]
        gaps = [after - before for _, tokens in times for before, after in pairwise(tokens)]
        first, last = ([tokens[i] - arrived for arrived, tokens in times] for i in (0, -1))
        rates = [len(tokens) / seconds for (_, tokens), seconds in zip(times, last, strict=True) if seconds > 0]
        return {
            "isl": tokens_in / len(self.outputs),
            "osl": tokens_out / len(self.outputs),
            "wall_seconds": self.wall,
            "output_tokens_per_second": tokens_out / self.wall,
            "total_tokens_per_second": (tokens_in + tokens_out) / self.wall,
            "requests_per_second": len(self.outputs) / self.wall,
            "request_output_tokens_per_second": statistics.median(rates) if rates else None,
            **_milliseconds("ttft", first),
            **_milliseconds("itl", gaps),
            **_milliseconds("e2e", last),
        }


def warm_up(llm: LLM, work: Workload) -> None:
    """Run what the timed run will use: as many requests, with steps of every size; then a few as long as they will be.

    These twice: a step with a prompt in it is captured when its shape is met again.
    """
    short = evolve(work, isl=min(work.isl, WARM_UP_ISL), osl=min(work.osl, WARM_UP_OSL), seed=work.seed + 1)
    if work.at_once:
        _thin_out(llm, short, room=work.isl + work.osl - short.isl)
    for seed in (work.seed + 2, work.seed + 3):
        timed_run(llm, evolve(short, requests=min(work.requests, WARM_UP_LONG), isl=work.isl, seed=seed))


def thinning(requests: int) -> list[int]:
    """Return tokens out of each of `requests` that start together: as they end, steps of decodes are of every padded size once.

    A size is captured when it is first met. In a timed run prompts that started in different steps end in different ones too.
    """
    sizes = padded_sizes(requests)
    return [1 + sum(size > number for size in sizes) for number in range(requests)]


def _thin_out(llm: LLM, work: Workload, *, room: int) -> None:
    """Run as many of the requests as run at once, thinning out, none longer than `room`."""
    together = work.requests if llm.plan is None else min(work.requests, llm.plan.max_num_seqs)
    params = [_greedy(min(tokens, room)) for tokens in thinning(together)]
    llm.generate(evolve(work, requests=together).prompts(llm.vocab_size), params, progress=False)


def timed_run(llm: LLM, work: Workload) -> Run:
    """Return one run; raise PaddockError when a request failed or gave another number of tokens than asked for."""
    params = _greedy(work.osl)
    prompts = work.prompts(llm.vocab_size)
    batches = [prompts] if work.at_once else [[prompt] for prompt in prompts]
    began = time.perf_counter()
    outputs = [output for batch in batches for output in llm.generate(batch, params, progress=False)]
    wall = time.perf_counter() - began
    for output in outputs:
        if len(output.token_ids) != work.osl:
            reason = output.outputs[0].error or f"{len(output.token_ids)} tokens instead of {work.osl}"
            raise PaddockError(
                f"request {output.request_id} failed: {reason}", fix="raise --max-model-len, or lower --isl or --osl"
            )
    return Run(wall=wall, outputs=tuple(outputs))


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def summary(runs: Sequence[Run]) -> dict[str, float | None]:
    """Return the median over runs of every figure."""
    each = [run.figures() for run in runs]
    return {name: median_known([figures[name] for figures in each]) for name in each[0]}


def median_known(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are known, None where none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Return median and 99th percentile (nearest rank) in milliseconds, None where there are no values."""
    if not seconds:
        return {f"{name}_median_ms": None, f"{name}_p99_ms": None}
    ranked = sorted(seconds)
    p99 = ranked[min(len(ranked) - 1, -(-99 * len(ranked) // 100) - 1)]
    return {f"{name}_median_ms": statistics.median(ranked) * 1000, f"{name}_p99_ms": p99 * 1000}
