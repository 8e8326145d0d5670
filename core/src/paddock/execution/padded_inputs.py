"""What a padded step reads, at fixed addresses, and how a step's numbers get there: one buffer, one copy.

Padding takes part as sequences of a slot and a page of its own that nobody looks at: a decode of one token, or a chunk of none.

S sequences and T tokens of the padded step, decodes first; C tokens of its chunks; R rows that are sampled, as many as sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from paddock.execution.batch import HostBatch
from paddock.execution.packing import HostArray, pack, unpack
from paddock.planning.padding import Padding, StepShape


@frozen(eq=False, kw_only=True)
class StepInputs:
    """The tensors of one shape. `sampled_R` says which token's row each sampled one is, `sampled_slots_R` whose token it decides.

    Without chunks every row is sampled and in order: `sampled_slots_R` is `slots_S`.
    """

    shape: StepShape
    slots_S: Tensor
    seq_lens_S: Tensor
    query_start_S1: Tensor
    positions_T: Tensor
    kv_slots_T: Tensor
    chunk_ids_C: Tensor
    sampled_R: Tensor
    sampled_slots_R: Tensor
    output_index_R: Tensor


@frozen(kw_only=True)
class Scratch:
    """Padding's slot, and the place of its K and V."""

    slot: int
    kv_slot: int


class InputBuffer:
    """The device's buffer that steps of every shape share: they run one after another."""

    def __init__(self, padding: Padding, scratch: Scratch, device: torch.device) -> None:
        """Allocate what the largest shape needs."""
        self._scratch, self._device = scratch, device
        self._buffer = pack(self._blank(padding.largest), pinned=False).to(device)
        self._views: dict[StepShape, StepInputs] = {}

    def inputs_of(self, shape: StepShape) -> StepInputs:
        """Return the buffer as steps of a shape see it."""
        if shape not in self._views:
            self._views[shape] = StepInputs(shape=shape, **unpack(self._buffer, self._blank(shape)))
        return self._views[shape]

    def send(self, host: HostBatch, shape: StepShape) -> None:
        """Start the copy of a laid out step, padded to `shape`."""
        self._send(self._filled(host, shape))

    def blank(self, shape: StepShape) -> None:
        """Start the copy of a step that is all padding."""
        self._send(self._blank(shape))

    def _send(self, arrays: dict[str, HostArray]) -> None:
        staged = pack(arrays, pinned=self._device.type == "cuda")
        self._buffer[: len(staged)].copy_(staged, non_blocking=True)  # the allocator keeps it from reuse until that has run

    def _blank(self, shape: StepShape) -> dict[str, HostArray]:
        """Return the arrays of a step that is all padding."""
        sequences, tokens, scratch = shape.sequences, shape.tokens, self._scratch
        return {
            "slots_S": np.full(sequences, scratch.slot, dtype=np.int64),
            "positions_T": np.zeros(tokens, dtype=np.int64),
            "kv_slots_T": np.full(tokens, scratch.kv_slot, dtype=np.int64),
            "chunk_ids_C": np.zeros(shape.chunk_tokens, dtype=np.int64),
            "sampled_R": np.zeros(sequences, dtype=np.int64),
            "sampled_slots_R": np.full(sequences, scratch.slot, dtype=np.int64),
            "seq_lens_S": np.ones(sequences, dtype=np.int32),
            "query_start_S1": np.minimum(np.arange(sequences + 1, dtype=np.int32), shape.decodes),
            "output_index_R": np.zeros(sequences, dtype=np.int32),
        }

    def _filled(self, host: HostBatch, shape: StepShape) -> dict[str, HostArray]:
        arrays, given, decodes, rows = self._blank(shape), host.arrays, host.num_decodes, len(host.sampled_slots)
        for name in ("slots", "seq_lens"):
            _place(arrays[f"{name}_S"], given[name], decodes, shape.decodes)
        for name in ("positions", "kv_slots"):
            _place(arrays[f"{name}_T"], given[name], decodes, shape.decodes)
        arrays["output_index_R"][:rows] = given["output_index"]
        arrays["sampled_slots_R"][:rows] = host.sampled_slots
        if shape.chunks:
            shift = shape.decodes - decodes  # by which padding moves the chunks' tokens
            stops = given["query_start"][decodes + 1 :] + shift
            arrays["query_start_S1"][shape.decodes + 1 :] = stops[-1]
            arrays["query_start_S1"][shape.decodes + 1 : shape.decodes + 1 + len(stops)] = stops
            arrays["chunk_ids_C"][: len(given["prefill_ids"])] = given["prefill_ids"]
            arrays["sampled_R"][:rows] = given["sampled"] + np.where(given["sampled"] < decodes, 0, shift)
        return arrays


def _place(padded: HostArray, given: HostArray, decodes: int, padded_decodes: int) -> None:
    """Put the decodes' entries first and those of the chunks where padded decodes end."""
    padded[:decodes] = given[:decodes]
    padded[padded_decodes : padded_decodes + len(given) - decodes] = given[decodes:]
