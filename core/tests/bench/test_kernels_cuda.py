"""On a GPU: kernels are timed in captured graphs, and every kernel that is installed is right."""

from __future__ import annotations

import pytest
import torch

from paddock.assemble import detect_hardware
from paddock.bench.kernels.measuring import Bench
from paddock.bench.kernels.timing import graph_seconds
from paddock.config import EngineConfig
from paddock.plugins.host import PluginHost

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_every_installed_kernel_is_right_and_timed() -> None:
    """Small sizes of each op and each backend that serves here pass their check and have a time."""
    bench = Bench(registry=PluginHost().collect(), hardware=detect_hardware(EngineConfig(model="", device="cuda")), quick=True)
    planned = [*map(bench.op_cases, bench.ops()), *map(bench.attention_cases, bench.backends())]
    rows = [each.measured() for cases in planned for each in cases]
    assert not [row for row in rows if row.problem]
    assert all(row.microseconds for row in rows)


def test_a_graphs_time_is_that_of_one_call() -> None:
    """A copy of half a gigabyte takes as long whether one call or three were captured."""
    source, target = (torch.ones(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(2))
    once, thrice = (graph_seconds(target.copy_, [(source,)] * times) for times in (1, 3))
    assert thrice == pytest.approx(once, rel=0.2)
