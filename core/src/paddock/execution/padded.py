"""Small steps at a few padded shapes, each captured as a CUDA graph when it is met.

A captured step costs the host one launch instead of hundreds. The first step of a shape runs uncaptured, which compiles what it
needs; nothing is captured at start-up. A shape of decodes alone is captured right after, one with prompts in it when it is met
again: those are many. Without capture the same steps run at the same shapes, and give the same tokens.

R rows of a step that are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from paddock import log
from paddock.errors import KernelError
from paddock.execution.batch import HostBatch
from paddock.execution.padded_inputs import InputBuffer, Scratch, StepInputs
from paddock.planning.padding import MIXED_GRAPHS, Padding, StepShape

Body = Callable[[StepInputs, int | None], Tensor]
Key = tuple[StepShape, int | None]


@frozen(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    out: Tensor


@frozen(eq=False)
class _Capturing:
    """What captures have in common: a stream beside the one that runs, and memory that one graph at a time uses."""

    stream: torch.cuda.Stream = field(factory=torch.cuda.Stream)
    pool: Any = field(factory=torch.cuda.graph_pool_handle)


class PaddedSteps:
    """Runs small steps of up to `most` sequences through `body`.

    `body(inputs, kind)` computes a step from its inputs alone, all on the device, and returns what is wanted of it, a row for
    each sequence, those that are sampled first; `kind` is its variant. `buffer_bytes` is about what the body allocates at most:
    graphs share one block of that size, whichever is met first.
    """

    def __init__(
        self, body: Body, *, most: int, scratch: Scratch, device: torch.device, capture: bool, buffer_bytes: int = 0
    ) -> None:
        """Capture nothing yet; `capture` False never does."""
        self._body, self._device, self._buffer_bytes = body, device, buffer_bytes
        self._padding = Padding(most)
        self._buffer = InputBuffer(self._padding, scratch, device)
        self._graphs: dict[Key, _Captured] = {}
        self._met: set[Key] = set()
        self._left_alone: set[Key] = set()
        self._capturing = _Capturing() if capture else None
        self.graph_bytes = 0  # taken from the device by captures, as the driver counts it

    @property
    def most(self) -> int:
        """Return the sequences of the largest step."""
        return self._padding.most

    def shape_for(self, host: HostBatch) -> StepShape | None:
        """Return the shape a laid out step is padded to, None where it is to run as it comes: as when it samples nothing."""
        if not len(host.sampled_slots):
            return None
        ids = host.arrays.get("prefill_ids")
        chunks, tokens = len(host.arrays["slots"]) - host.num_decodes, 0 if ids is None else len(ids)
        return self._padding.padded(StepShape(decodes=host.num_decodes, chunks=chunks, chunk_tokens=tokens))

    def run(self, host: HostBatch, shape: StepShape, kind: int | None) -> tuple[StepInputs, Tensor]:
        """Start a step; return its padded inputs and the rows [R, ...] of what the body gives."""
        inputs, key, rows = self._buffer.inputs_of(shape), (shape, kind), len(host.sampled_slots)
        self._buffer.send(host, shape)
        found = self._graphs.get(key)
        if found is not None:
            found.graph.replay()
            return inputs, found.out[:rows]
        out = self._body(inputs, kind)
        if self._capturing is not None and self._is_due(key):
            self._capture(key, self._capturing)
        self._met.add(key)
        return inputs, out[:rows]

    def rehearse(self, shape: StepShape, kind: int | None) -> None:
        """Start a step of padding alone; capture nothing."""
        padded = self._padding.padded(shape)
        assert padded is not None, shape
        self._buffer.blank(padded)
        self._body(self._buffer.inputs_of(padded), kind)

    def forget(self) -> None:
        """Drop every captured step, and with them their memory; each is captured anew when it is met."""
        self._graphs.clear()
        self._left_alone.clear()
        self._capturing = None if self._capturing is None else _Capturing()
        self.graph_bytes = 0

    def _is_due(self, key: Key) -> bool:
        """Return whether a step that has just run is to be captured."""
        shape, _ = key
        if key in self._left_alone:
            return False
        if not shape.chunks:
            return True
        return key in self._met and sum(captured.chunks > 0 for captured, _ in self._graphs) < MIXED_GRAPHS

    def _capture(self, key: Key, capturing: _Capturing) -> None:
        """Keep a step that has just run as a graph; where memory is too short for it, say so and go on without."""
        shape, kind = key
        try:
            self._graphs[key] = self._captured(self._buffer.inputs_of(shape), kind, capturing)
        except RuntimeError as error:
            if not is_shortage(error):
                raise KernelError(
                    f"a step of {shape.sequences} sequences and {shape.tokens} tokens cannot be captured: {error}",
                    fix="set enforce_eager (--enforce-eager)",
                ) from error
            self._left_alone.add(key)
            if not self._graphs:  # the pool's only graph is gone with the error, and torch captures into no such pool
                self._capturing = _Capturing()
            log.get_logger().warning(
                "step_not_captured",
                sequences=shape.sequences,
                tokens=shape.tokens,
                fix="lower gpu_memory_utilization or max_num_seqs",
            )

    def _captured(self, inputs: StepInputs, kind: int | None, capturing: _Capturing) -> _Captured:
        """Return the step as a graph; nothing runs. Unlike `torch.cuda.graph` it does not wait for what does."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        capturing.stream.wait_stream(current)
        with torch.cuda.stream(capturing.stream):
            graph.capture_begin(pool=capturing.pool, capture_error_mode="thread_local")
            try:
                if not self._graphs:  # a block of the allocator's that smaller steps split, instead of one for every shape
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
