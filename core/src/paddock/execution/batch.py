"""A step in tensors: what the model and the sampler read, complete at construction, sent in one copy.

T tokens, S sequences, R sampled rows, M pages a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np
import torch
from attrs import field, frozen
from numpy.typing import NDArray
from torch import Tensor

from paddock.execution.packing import HostArray, to_device
from paddock.execution.sampling_state import FEATURES
from paddock.execution.slots import SlotTable
from paddock.layers.attention import AttentionInputs
from paddock.scheduling.step import Step

Indices = NDArray[np.int64]
PICKED = "picked_"  # begins the name of an array of picked rows


@frozen(eq=False)
class Pick:
    """Some of the sampled rows: their indices on the host and, where they are not all of them, on the device."""

    rows: Indices
    row_R: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """Return the picked rows of `values` [R, ...]; no copy when all are."""
        return values if self.row_R is None else values.index_select(0, self.row_R)

    def put(self, values: Tensor, picked: Tensor) -> Tensor:
        """Return `values` [R, ...] with the picked rows replaced."""
        return picked if self.row_R is None else values.index_copy_(0, self.row_R, picked)


@frozen(eq=False, kw_only=True)
class SampleRows:
    """Whose token each sampled row decides. `output_index_R` (int32) counts the tokens the sequence already has put out.

    `picks` holds, for each feature some row has, which rows have it.
    """

    slots: Indices
    slot_R: Tensor
    output_index_R: Tensor
    picks: dict[int, Pick] = field(factory=dict)


@frozen(eq=False, kw_only=True)
class Batch:
    """One step's tensors. `sampled_T` says which tokens' rows are sampled, None when every one is."""

    token_ids_T: Tensor
    inputs: AttentionInputs
    sampled_T: Tensor | None
    sample: SampleRows


@frozen(eq=False, kw_only=True)
class HostBatch:
    """The same on the host: named arrays to send, and the numbers that stay. `num_pages` is the longest sequence's."""

    arrays: dict[str, HostArray]
    num_pages: int
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    sampled_slots: Indices
    picks: dict[int, Indices]

    def picks_from(self, sent: Mapping[str, Tensor]) -> dict[int, Pick]:
        """Return the picks, those of some rows only with their indices on the device, as `sent`."""
        return {feature: Pick(rows, sent.get(f"{PICKED}{feature}")) for feature, rows in self.picks.items()}


def send(host: HostBatch, slots: SlotTable, last_token_S: Tensor) -> Batch:
    """Return a laid out step's batch on the device of `last_token_S`, which holds the tokens that decodes feed in."""
    sent = to_device(host.arrays, last_token_S.device)
    token_ids_T = last_token_S.index_select(0, sent["slots"][: host.num_decodes])
    if "prefill_ids" in sent:
        token_ids_T = torch.cat((token_ids_T, sent["prefill_ids"]))
    inputs = AttentionInputs(
        positions_T=sent["positions"],
        slots_T=sent["kv_slots"],
        query_start_S1=sent["query_start"],
        seq_lens_S=sent["seq_lens"],
        block_tables_SM=slots.device_tables_SM[:, : host.num_pages].index_select(0, sent["slots"]),
        page_size=slots.page_size,
        num_decodes=host.num_decodes,
        max_query_len=host.max_query_len,
        max_seq_len=host.max_seq_len,
    )
    sample = SampleRows(
        slots=host.sampled_slots,
        slot_R=sent.get("sampled_slots", sent["slots"]),
        output_index_R=sent["output_index"],
        picks=host.picks_from(sent),
    )
    return Batch(token_ids_T=token_ids_T, inputs=inputs, sampled_T=sent.get("sampled"), sample=sample)


def lay_out(step: Step, slots: SlotTable) -> HostBatch:
    """Return the step's host arrays: decodes first, then prefills, their tokens one after the other."""
    chunks, num_decodes, page_size = step.prefills, len(step.decode_slots), slots.page_size
    slot_S = np.array(step.decode_slots + [chunk.slot for chunk in chunks], dtype=np.int64)
    start_S = np.array(step.decode_positions + [chunk.start for chunk in chunks], dtype=np.int64)
    length_S = np.ones(len(slot_S), dtype=np.int64)
    length_S[num_decodes:] = [len(chunk.token_ids) for chunk in chunks]
    query_start_S1 = np.zeros(len(slot_S) + 1, dtype=np.int64)
    np.cumsum(length_S, out=query_start_S1[1:])
    slot_T, positions_T = slot_S, start_S
    if chunks:
        slot_T = np.repeat(slot_S, length_S)
        positions_T = np.arange(query_start_S1[-1]) + np.repeat(start_S - query_start_S1[:-1], length_S)
    pages_T, rows_T = np.divmod(positions_T, page_size)
    seq_lens_S = start_S + length_S
    max_seq_len = int(seq_lens_S.max())
    arrays: dict[str, HostArray] = {
        "slots": slot_S,
        "positions": positions_T,
        "kv_slots": slots.block_tables_SM[slot_T, pages_T].astype(np.int64) * page_size + rows_T,
        "query_start": query_start_S1.astype(np.int32),
        "seq_lens": seq_lens_S.astype(np.int32),
    }
    sampled_slots, sampled_lens = slot_S, seq_lens_S
    if chunks:
        arrays["prefill_ids"] = np.array(list(chain.from_iterable(chunk.token_ids for chunk in chunks)), dtype=np.int64)
        samples_S = np.array([True] * num_decodes + [chunk.samples for chunk in chunks])
        sampled_slots, sampled_lens = slot_S[samples_S], seq_lens_S[samples_S]
        arrays["sampled_slots"] = sampled_slots
        arrays["sampled"] = query_start_S1[1:][samples_S] - 1
    arrays["output_index"] = (sampled_lens - slots.prompt_lens_S[sampled_slots]).astype(np.int32)
    picks = _picks(slots.features_S[sampled_slots])
    for feature, rows in picks.items():
        if len(rows) < len(sampled_slots):
            arrays[f"{PICKED}{feature}"] = rows
    return HostBatch(
        arrays=arrays,
        num_pages=-(-max_seq_len // page_size),
        num_decodes=num_decodes,
        max_query_len=int(length_S.max()),
        max_seq_len=max_seq_len,
        sampled_slots=sampled_slots,
        picks=picks,
    )


def _picks(features_R: NDArray[np.uint8]) -> dict[int, Indices]:
    """Return the rows that have each feature, for the features some row has."""
    present = int(np.bitwise_or.reduce(features_R)) if len(features_R) else 0
    return {feature: np.flatnonzero(features_R & feature) for feature in FEATURES if present & feature}
