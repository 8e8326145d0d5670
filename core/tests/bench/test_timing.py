"""How long a graph runs before it is timed, and how near a kernel's FP8 values are to its twin's."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paddock.bench.kernels import timing
from paddock.bench.kernels.verdict import Verdict, op_verdict
from paddock.layers import reference


@pytest.mark.parametrize(("seconds", "warmed"), [(0.0, 2), (0.05, 4)])
def test_a_graph_is_replayed_for_a_while_before_it_is_timed(seconds: float, warmed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least so often and so long: a replay of 10 ms, which is 20 before it is warm, takes 10."""
    now, replays = [0.0], list[float]()

    def between(replay: Any) -> float:
        replays.append(0.02 if len(replays) < 2 else 0.01)
        now[0] += 0.0125
        return replays[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_between_events", between)
    monkeypatch.setattr("paddock.bench.kernels.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls = list[int]()
    assert timing.graph_seconds(calls.append, [(1,), (2,)], timing.Rounds(warm=2, timed=3, warm_seconds=seconds)) == 0.01 / 2
    assert calls == [1, 1, 1, 2]
    assert len(replays) == warmed + 3


def test_few_fp8_values_may_be_their_neighbours_of_many_a_thousandth() -> None:
    """Two values on a tie are not wrong because a row is short; three are, and one that is two steps away, over zero too."""
    twin = reference.quantize_fp8_static

    def verdict(values: int, changed: int, steps: int) -> Verdict:
        def near(x_TE: torch.Tensor, scale: torch.Tensor) -> Any:
            found = twin(x_TE, scale)
            code_X = found.values_TI.view(torch.uint8).view(-1)
            code_X[:changed] += steps
            return found

        return op_verdict("quantize_fp8_static", near, twin, lambda seed: (torch.full((1, values), 3.0), torch.tensor(1.0)))

    assert [verdict(448, changed, 1).right for changed in (0, 1, 2, 3)] == [True, True, True, False]
    assert [verdict(100_000, changed, 1).right for changed in (99, 101)] == [True, False]
    far = verdict(100_000, 1, 2)
    assert (far.right, far.what, far.error) == (False, "FP8 values from the twin's, in steps", 2)
    assert not verdict(448, 1, 128).right  # the sign
