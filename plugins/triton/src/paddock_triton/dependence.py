"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits only before it touches its data.

That hides a launch and the first loads of weights behind the kernel before: a Llama-3.1-8B layer at batch 1 is nine kernels of
2 to 70 us. Rules for a kernel launched with `DEPENDENT`: every program calls `start_next` first, and `wait` before it reads what
an earlier kernel wrote and before it writes anything, for memory may be given anew to the next tensor while its last reader
runs. Sooner may be read: weights and tables, which no kernel writes; and what was there before a kernel of another kind ran:
positions, slots, lengths and page tables, which the host sends before a step, and units of attention, after which counters are
zeroed. No program returns without having waited: what starts after a kernel counts on everything before it being done.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_ON_GPU = tl.constexpr(not knobs.runtime.interpret)
DEPENDENT: dict[str, bool] = {"launch_pdl": True} if not knobs.runtime.interpret else {}  # launch options


@triton.jit
def start_next() -> None:
    """Let the next kernel start as soon as all programs of this one have."""
    if _ON_GPU:
        gdc_launch_dependents()


@triton.jit
def fetch(ptr: tl.tensor) -> None:
    """Bring the 128 bytes at each address into the L2 cache, without waiting for them."""
    if _ON_GPU:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait() -> None:
    """Return once every earlier kernel is done and what it wrote is seen."""
    if _ON_GPU:
        gdc_wait()
