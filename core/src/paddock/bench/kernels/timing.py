"""What a call costs: on a GPU inside a captured graph, as in a step; on a CPU by the clock on the wall.

Calls go round among sets of arguments that together exceed the L2 cache by far, so that none finds its own data there. They are
gone through for a while before they are timed. Decodes of 64 sequences of 8k over the same FP8 pages took 300.6 us on an H200
right after torch's allocator had been emptied of 4 GB, as a capture empties it, and 268.5 the next time, twice over; why, and
how long that lasts, is not known.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen

from paddock.bench.kernels.case import Case

Call = Callable[..., Any]
Sets = Sequence[tuple[Any, ...]]
L2_SPANS = 5  # how many times the L2 the sets are in all
MOST_SETS, FEWEST_SETS = 32, 2
_EAGER_ROUNDS = 5  # at most, of calls that no graph holds


@frozen(kw_only=True)
class Rounds:
    """How often all sets are gone through: first untimed, at least so often and for so many seconds, then timed."""

    warm: int
    timed: int
    warm_seconds: float = 0.0


MANY, FEW = (
    Rounds(warm=3, timed=12, warm_seconds=0.1),
    Rounds(warm=1, timed=3),
)  # for what is judged by its time; for what it is shown beside


def argument_sets(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """Return enough sets of arguments that no call finds its own in the L2; for small cases, about a model's layers."""
    if device.type != "cuda":
        return [case.make(seed) for seed in range(FEWEST_SETS)]
    span = L2_SPANS * torch.cuda.get_device_properties(device).L2_cache_size
    return [case.make(seed) for seed in range(max(FEWEST_SETS, min(MOST_SETS, int(span / case.nbytes) + 1)))]


def seconds(call: Call, sets: Sets, device: torch.device, *, captured: bool = True, rounds: Rounds = MANY) -> float:
    """Return the median seconds of a call; not `captured`, it is launched anew each time, for what works on the host."""
    if device.type != "cuda":
        return _wall_seconds(call, sets, min(rounds.timed, _EAGER_ROUNDS))
    return graph_seconds(call, sets, rounds) if captured else _launched_seconds(call, sets, min(rounds.timed, _EAGER_ROUNDS))


def graph_seconds(call: Call, sets: Sets, rounds: Rounds = MANY) -> float:
    """Return the seconds of one call inside a captured graph of one call a set, the median of several replays."""
    for _ in range(2):
        call(*sets[0])
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept += [call(*arguments) for arguments in sets]  # kept, so that each call writes a place of its own
    began, warmed = time.perf_counter(), 0
    while warmed < rounds.warm or time.perf_counter() - began < rounds.warm_seconds:
        _between_events(graph.replay)
        warmed += 1
    return statistics.median(_between_events(graph.replay) for _ in range(rounds.timed)) / len(sets)


def _launched_seconds(call: Call, sets: Sets, rounds: int) -> float:
    def round_of_calls() -> None:
        for arguments in sets:
            call(*arguments)

    call(*sets[0])
    return statistics.median(_between_events(round_of_calls) for _ in range(rounds)) / len(sets)


def _between_events(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _wall_seconds(call: Call, sets: Sets, rounds: int) -> float:
    call(*sets[0])
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for arguments in sets:
            call(*arguments)
        times.append((time.perf_counter() - began) / len(sets))
    return statistics.median(times)
