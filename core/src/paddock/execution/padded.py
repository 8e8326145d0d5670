"""Decode steps at a few padded sizes, each captured as a CUDA graph when it is first met.

A captured step costs the host one launch instead of hundreds. Its addresses are fixed: what changes from step to step comes in
through one buffer, and padding takes part as a sequence of its own slot and page that nobody looks at. The first step of a size
runs uncaptured, which compiles what it needs; then it is captured, so nothing is captured at start-up. Without capture the same
steps run at the same sizes, and give the same tokens.

n rows of a padded step, R rows of it that are a step's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from paddock import log
from paddock.errors import KernelError
from paddock.execution.batch import HostBatch
from paddock.execution.packing import HostArray, pack, unpack
from paddock.planning.ledger import padded_sizes


@frozen(eq=False, kw_only=True)
class DecodeInputs:
    """What a padded decode step reads, at fixed addresses: slot, position, place of K and V, length, and tokens put out [n].

    `query_start_S1` counts 0 to n.
    """

    slots: Tensor
    positions: Tensor
    kv_slots: Tensor
    seq_lens: Tensor
    output_index: Tensor
    query_start_S1: Tensor


Body = Callable[[DecodeInputs, int | None], Tensor]


@frozen(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    out: Tensor


@frozen(eq=False)
class _Capturing:
    """What captures have in common: a stream beside the one that runs, and memory that one graph at a time uses."""

    stream: torch.cuda.Stream = field(factory=torch.cuda.Stream)
    pool: Any = field(factory=torch.cuda.graph_pool_handle)


class PaddedDecodes:
    """Runs decode steps of up to `most` sequences through `body`.

    `body(inputs, kind)` computes a step from its inputs alone, all on the device, and returns what is wanted of it, a row for
    each of its own; `kind` is its variant. `scratch_slot` and `scratch_kv_slot` are padding's. `buffer_bytes` is about what
    the body allocates for `most` sequences: graphs share one block of that size, whichever size is met first.
    """

    def __init__(
        self,
        body: Body,
        *,
        most: int,
        scratch_slot: int,
        scratch_kv_slot: int,
        device: torch.device,
        capture: bool,
        buffer_bytes: int = 0,
    ) -> None:
        """Capture nothing yet; `capture` False never does."""
        self._body, self._device, self._buffer_bytes = body, device, buffer_bytes
        self._padding = {"slots": scratch_slot, "positions": 0, "kv_slots": scratch_kv_slot, "seq_lens": 1, "output_index": 0}
        self._sizes = padded_sizes(most)
        self._buffer = pack(self._blank(most), pinned=False).to(device)
        self._starts_S1 = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._inputs: dict[int, DecodeInputs] = {}
        self._graphs: dict[tuple[int, int | None], _Captured] = {}
        self._too_large: set[tuple[int, int | None]] = set()
        self._capturing = _Capturing() if capture else None
        self.graph_bytes = 0  # taken from the device by captures, as the driver counts it

    def run(self, host: HostBatch, kind: int | None) -> tuple[DecodeInputs, Tensor]:
        """Start a step of decodes alone; return its padded inputs and the rows [R, ...] of what the body gives."""
        rows = len(host.sampled_slots)
        size = self._sizes[bisect_left(self._sizes, rows)]
        inputs = self._inputs_of(size)
        self._send(host, rows, size)
        found = self._graphs.get((size, kind))
        if found is not None:
            found.graph.replay()
            return inputs, found.out[:rows]
        out = self._body(inputs, kind)
        if self._capturing is not None and (size, kind) not in self._too_large:
            self._capture(size, kind, self._capturing)
        return inputs, out[:rows]

    def forget(self) -> None:
        """Drop every captured step, and with them their memory; each is captured anew when it is met."""
        self._graphs.clear()
        self._too_large.clear()
        self._capturing = None if self._capturing is None else _Capturing()
        self.graph_bytes = 0

    def _inputs_of(self, size: int) -> DecodeInputs:
        if size not in self._inputs:
            views = unpack(self._buffer, self._blank(size))
            self._inputs[size] = DecodeInputs(**views, query_start_S1=self._starts_S1[: size + 1])
        return self._inputs[size]

    def _blank(self, size: int) -> dict[str, HostArray]:
        wide = {name: np.full(size, self._padding[name], dtype=np.int64) for name in ("slots", "positions", "kv_slots")}
        return {**wide, **{name: np.full(size, self._padding[name], dtype=np.int32) for name in ("seq_lens", "output_index")}}

    def _send(self, host: HostBatch, rows: int, size: int) -> None:
        arrays = self._blank(size)
        for name, array in arrays.items():
            array[:rows] = host.arrays[name]
        staged = pack(arrays, pinned=self._device.type == "cuda")  # the allocator keeps it from reuse until the copy has run
        self._buffer[: len(staged)].copy_(staged, non_blocking=True)

    def _capture(self, size: int, kind: int | None, capturing: _Capturing) -> None:
        """Keep a step that has just run as a graph; where memory is too short for it, say so and go on without."""
        try:
            self._graphs[size, kind] = self._captured(self._inputs[size], kind, capturing)
        except RuntimeError as error:
            if not is_shortage(error):
                raise KernelError(
                    f"a decode step of {size} sequences cannot be captured: {error}", fix="set enforce_eager (--enforce-eager)"
                ) from error
            self._too_large.add((size, kind))
            if not self._graphs:  # the pool's only graph is gone with the error, and torch captures into no such pool
                self._capturing = _Capturing()
            log.get_logger().warning("decodes_not_captured", size=size, fix="lower gpu_memory_utilization or max_num_seqs")

    def _captured(self, inputs: DecodeInputs, kind: int | None, capturing: _Capturing) -> _Captured:
        """Return the step as a graph; nothing runs. Unlike `torch.cuda.graph` it does not wait for what does."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        capturing.stream.wait_stream(current)
        with torch.cuda.stream(capturing.stream):
            graph.capture_begin(pool=capturing.pool, capture_error_mode="thread_local")
            try:
                if not self._graphs:  # a block of the allocator's that smaller steps split, instead of one for every size
                    torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self._device)
                out = self._body(inputs, kind)
            except BaseException:
                with suppress(RuntimeError):  # a capture that broke off ends with an error of its own
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(capturing.stream)
        self.graph_bytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return _Captured(graph, out)


def is_shortage(error: RuntimeError) -> bool:
    """Return whether memory was too short: the allocator's, or the driver's where it makes or first launches a graph."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
