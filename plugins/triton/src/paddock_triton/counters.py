"""Zeros by which programs of a kernel that wait for others count: those of 4-bit products do."""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTERS = 1 << 16
_counters_of: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Return at least `count` zeros, which every kernel leaves so: kernels that share them run one after another.

    A captured graph goes on using those that were kept when it was captured, so these are never replaced; a kernel that counts
    more has its own, made anew each time.
    """
    kept = _counters_of.get(device)
    if kept is not None and count <= _COUNTERS:
        return kept
    made = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # what is made then is the graph's own
    if kept is None and not capturing and count <= _COUNTERS:
        _counters_of[device] = made
    return made
