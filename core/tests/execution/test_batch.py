"""Batches against a naive construction, and the one buffer they travel in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.execution.batch import lay_out, send
from paddock.execution.packing import pack, unpack
from paddock.execution.sampling_state import DRAWN, FEATURES, LOGPROBS
from paddock.execution.slots import SlotTable
from paddock.scheduling.step import PrefillChunk, Step

PAGE, SLOTS, LENGTH = 4, 8, 40

sequence = st.fixed_dictionaries(
    {
        "start": st.integers(0, 20),
        "tokens": st.lists(st.integers(0, 99), min_size=1, max_size=9),
        "samples": st.booleans(),
        "features": st.integers(0, 31),
        "prompt_len": st.integers(1, 5),
    }
)


@st.composite
def steps(draw: Any) -> Any:
    """Return a step of random decodes and prefills over random slots, its slot table, and all sequences in step order."""
    decodes = draw(st.lists(sequence, max_size=4))
    prefills = draw(st.lists(sequence, min_size=0 if decodes else 1, max_size=3))
    slots = draw(st.permutations(range(SLOTS)))
    pages = iter(draw(st.permutations(range(SLOTS * LENGTH // PAGE))))
    table, step = SlotTable(SLOTS, LENGTH, PAGE), Step(0)
    for slot, parts in zip(slots, decodes + prefills, strict=False):
        table.admit(slot, prompt_len=parts["prompt_len"], features=parts["features"])
        parts["pages"] = [next(pages) for _ in range(LENGTH // PAGE)]
        step.pages += [(slot, 0, parts["pages"][:3]), (slot, 3, parts["pages"][3:])]
    step.decode_slots = list(slots[: len(decodes)])
    step.decode_positions = [parts["start"] for parts in decodes]
    for slot, parts in zip(slots[len(decodes) :], prefills, strict=False):
        step.prefills.append(PrefillChunk(slot, parts["start"], parts["tokens"], parts["samples"]))
    table.grant(step.pages)
    return step, table, slots, decodes, prefills


@settings(max_examples=100, deadline=None)
@given(steps())
def test_batches_equal_their_naive_construction(drawn: Any) -> None:
    """Every tensor of a batch is what a loop over sequences and tokens builds."""
    step, table, slots, decodes, prefills = drawn
    last_token = torch.arange(100, 100 + SLOTS)
    ids, positions, kv_slots, starts, lens, sampled, sampled_slots, index = [], [], [], [0], [], [], [], []
    for s, parts in enumerate(decodes + prefills):
        tokens = [100 + slots[s]] if s < len(decodes) else parts["tokens"]
        for offset, token in enumerate(tokens):
            position = parts["start"] + offset
            ids.append(token)
            positions.append(position)
            kv_slots.append(parts["pages"][position // PAGE] * PAGE + position % PAGE)
        starts.append(len(ids))
        lens.append(parts["start"] + len(tokens))
        if s < len(decodes) or parts["samples"]:
            sampled.append(len(ids) - 1)
            sampled_slots.append(slots[s])
            index.append(lens[-1] - parts["prompt_len"])
    batch = send(lay_out(step, table), table, last_token)
    inputs = batch.inputs
    assert batch.token_ids_T.tolist() == ids
    assert inputs.positions_T.tolist() == positions
    assert inputs.slots_T.tolist() == kv_slots
    assert inputs.query_start_S1.tolist() == starts
    assert inputs.seq_lens_S.tolist() == lens
    assert (inputs.num_decodes, inputs.max_seq_len) == (len(decodes), max(lens))
    assert inputs.max_query_len == max(np.diff(starts))
    width = -(-max(lens) // PAGE)
    assert inputs.block_tables_SM.tolist() == [parts["pages"][:width] for parts in decodes + prefills]
    assert (list(range(len(ids))) if batch.sampled_T is None else batch.sampled_T.tolist()) == sampled
    assert batch.sample.slots.tolist() == batch.sample.slot_R.tolist() == sampled_slots
    assert batch.sample.output_index_R.tolist() == index
    for feature in FEATURES:
        rows = [r for r, slot in enumerate(sampled_slots) if table.features_S[slot] & feature]
        pick = batch.sample.picks.get(feature)
        assert ([] if pick is None else pick.rows.tolist()) == rows
        if pick is not None:
            assert pick.take(torch.tensor(sampled_slots)).tolist() == [sampled_slots[r] for r in rows]


@settings(max_examples=50, deadline=None)
@given(steps())
def test_arrays_survive_the_one_buffer(drawn: Any) -> None:
    """What is unpacked from the buffer equals what was packed, in name, type and shape."""
    arrays = lay_out(drawn[0], drawn[1]).arrays
    arrays["none"], arrays["real"] = np.zeros((0, 3), np.int32), np.array([[1.5, -2.0]], np.float32)
    unpacked = unpack(pack(arrays, pinned=False), arrays)
    assert list(unpacked) == list(arrays)
    for name, array in arrays.items():
        assert unpacked[name].numpy().dtype == array.dtype
        assert np.array_equal(unpacked[name].numpy(), array)


def test_a_batch_without_features_picks_nothing() -> None:
    """Plain greedy decodes carry no picks, and a feature of every row needs no indices."""
    table = SlotTable(4, 16, PAGE)
    step = Step(0, decode_slots=[0, 2], decode_positions=[3, 3])
    assert send(lay_out(step, table), table, torch.zeros(4, dtype=torch.int64)).sample.picks == {}
    for slot in range(4):
        table.admit(slot, prompt_len=1, features=DRAWN | (LOGPROBS if slot else 0))
    picks = send(lay_out(step, table), table, torch.zeros(4, dtype=torch.int64)).sample.picks
    assert picks[DRAWN].row_R is None
    row_R = picks[LOGPROBS].row_R
    assert row_R is not None
    assert row_R.tolist() == [1]
