"""Time one schedule() and one commit() in steady decode and print a table: `python tests/bench/scheduler.py`."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version

from paddock.request import Request, SamplingParams
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler
from paddock.scheduling.step import Step, StepResult

PAGE_SIZE, PROMPT_LEN = 16, 200


def steady_scheduler(num_seqs: int, num_steps: int, *, prefix_caching: bool) -> Scheduler:
    """Return a scheduler whose sequences all decode; their lengths are staggered, so page edges are spread over the steps."""
    max_model_len = PROMPT_LEN + PAGE_SIZE + num_steps + 16
    limits = SchedulerLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * (PROMPT_LEN + PAGE_SIZE),
        max_model_len=max_model_len,
        num_pages=num_seqs * (max_model_len // PAGE_SIZE + 2),
        page_size=PAGE_SIZE,
        enable_prefix_caching=prefix_caching,
    )
    scheduler = Scheduler(limits)
    for i in range(num_seqs):
        prompt = tuple(i * 1000 + j for j in range(PROMPT_LEN + i % PAGE_SIZE))
        params = SamplingParams(max_tokens=None, stop_token_ids=(2,))
        scheduler.add(Request(request_id=f"request-{i}", prompt_token_ids=prompt, params=params, eos_ids=frozenset({0, 1})))
    return scheduler


def advance(scheduler: Scheduler) -> Step:
    """Return the next step, which is there."""
    step = scheduler.schedule()
    assert step is not None
    return step


def measure(num_seqs: int, num_steps: int, *, prefix_caching: bool) -> tuple[float, float, float]:
    """Return median microseconds of schedule, of commit and of both together, one step in flight throughout."""
    scheduler = steady_scheduler(num_seqs, num_steps, prefix_caching=prefix_caching)
    in_flight = advance(scheduler)
    schedule_us, commit_us = [], []
    for number in range(num_steps):
        start = time.perf_counter()
        step = advance(scheduler)
        scheduled = time.perf_counter()
        result = StepResult([3 + number] * in_flight.num_samples)
        launched = time.perf_counter()
        updates = scheduler.commit(in_flight, result)
        committed = time.perf_counter()
        assert len(updates) == num_seqs
        in_flight = step
        schedule_us.append((scheduled - start) * 1e6)
        commit_us.append((committed - launched) * 1e6)
    total_us = [sum(pair) for pair in zip(schedule_us, commit_us, strict=True)]
    return statistics.median(schedule_us), statistics.median(commit_us), statistics.median(total_us)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="measured steps a row (default 2000)")
    steps = parser.parse_args().steps
    print(f"Python {platform.python_version()}, attrs {version('attrs')}, {platform.machine()}, {steps} steps a row, median\n")
    print("| sequences | prefix caching | schedule us | commit us | total us |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for num_seqs in (1, 8, 64, 256, 512):
        for prefix_caching in (True, False):
            schedule, commit, total = measure(num_seqs, steps, prefix_caching=prefix_caching)
            print(f"| {num_seqs} | {'on' if prefix_caching else 'off'} | {schedule:.1f} | {commit:.1f} | {total:.1f} |")


if __name__ == "__main__":
    main()
