"""Compile some kernels ahead by processes, for compute capability 9.0 without a GPU; print which this process compiled itself.

With the word `dead` every process has ended before its first kernel, of which there are fewer then. One kernel is the script's
own, which no other process can import. Printed last, as JSON: the names compiled here, those read from the cache, and how many
processes are left.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from plugins.triton.tests.compile_for_hopper import TOKENS, _calls, pretend
from triton import knobs

from paddock.plugins import resolve
from paddock_triton import launch, plugin
from paddock_triton.compiler_processes import CompilerProcesses

EXAMPLES = ("linear", "rms_norm", "draw", "linear_int4_fp8", "linear_fp8", "attention, FP8 pages of 64")
FEW_EXAMPLES = EXAMPLES[:3]


@triton.jit  # type: ignore[untyped-decorator]
def _own_kernel(x_ptr: tl.tensor) -> None:
    tl.store(x_ptr, 1)


def main() -> None:
    """Compile and print."""
    pretend()
    launch._LEAST_PROCESSES = 1
    here: list[str] = []
    cached: list[str] = []
    started: list[Any] = []
    start = CompilerProcesses._started

    def watched_start(self: CompilerProcesses) -> Any:
        worker = start(self)
        if worker is not None:
            started.append(worker)
            if "dead" in sys.argv:
                worker.process.kill()
                worker.process.wait()
        return worker

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        (cached if cache_hit else here).append(src.name)

    CompilerProcesses._started = watched_start  # type: ignore[method-assign]
    knobs.compilation.listener = listener
    calls = _calls(TOKENS)
    with resolve(plugin.COMPILE_AHEAD)(torch.device("cpu")):
        for name in FEW_EXAMPLES if "dead" in sys.argv else EXAMPLES:
            calls[name]()
        launch.launch(_own_kernel, (1,), torch.zeros(1))
    left = sum(worker.process.poll() is None for worker in started)
    json.dump({"here": here, "cached": cached, "started": len(started), "left": left}, sys.stdout)


if __name__ == "__main__":
    main()
