"""Decodes at padded sizes: the same tokens, however many rows are padding, and whatever the sampler is asked for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.execution.batch import lay_out
from paddock.execution.padded import DecodeInputs, PaddedDecodes
from paddock.execution.runner import Decodes
from paddock.execution.slots import SlotTable
from paddock.planning.ledger import padded_sizes
from paddock.request import SamplingParams
from paddock.scheduling.step import PrefillChunk, Step

WAYS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=1.1, top_k=5, top_p=0.9),
    SamplingParams(temperature=0.8, min_p=0.1),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=2),
]


@given(st.integers(1, 5000))
def test_every_number_of_sequences_has_a_size(most: int) -> None:
    """Sizes rise to the most there can be, and few rows are padding: at most half of up to 8, 7 to 256, 15 to 512, 31 above."""
    sizes = padded_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for smaller, size in pairwise(sizes):
        assert size - smaller <= (max(1, size // 2) if size <= 8 else 8 if size <= 256 else 16 if size <= 512 else 32)


def _run(rig: Any, admit: Any, ways: list[SamplingParams]) -> list[Any]:
    """Return what a prompt of each way, then five steps of decodes, gives."""
    runner, prompts = rig.runner, [[3 + i, 1, 4] for i in range(len(ways))]
    step = Step(0)
    for i, (way, prompt) in enumerate(zip(ways, prompts, strict=True)):
        step.admissions.append(admit(i, way, prompt=prompt, seed=i))
        step.prefills.append(PrefillChunk(i, 0, prompt, True))
        step.pages.append((i, 0, [2 * i, 2 * i + 1]))
    found = [runner.launch(step).result()]
    for position in range(3, 8):
        slots = list(range(len(ways)))
        found.append(runner.launch(Step(0, decode_slots=slots, decode_positions=[position] * len(ways))).result())
    return [(each.token_ids, each.logprobs.keys()) for each in found]


@settings(max_examples=30, deadline=None)
@given(ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=8))
def test_padding_changes_no_token(ways: list[SamplingParams]) -> None:
    """Every mix of greedy, drawn, filtered and penalised rows gets the tokens it gets without padding."""
    from core.tests.execution.conftest import admission, paged_runner

    plain, padded = (_run(paged_runner(decodes), admission, ways) for decodes in (Decodes.AS_THEY_COME, Decodes.PADDED))
    assert plain == padded


def test_a_page_granted_twice_in_a_step_belongs_to_the_later_holder(rig: Any, admit: Any) -> None:
    """A slot that changes hands within a step reads the pages of its last holder alone."""
    made = rig()
    prompt = [5, 6, 7]
    step = Step(0, prefills=[PrefillChunk(1, 0, prompt, True)], admissions=[admit(1, WAYS[0], prompt=prompt)])
    step.pages = [(1, 0, [7, 8]), (1, 0, [3, 4])]
    tokens = made.runner.launch(step).result().token_ids
    tokens += made.runner.launch(Step(0, decode_slots=[1], decode_positions=[3])).result().token_ids
    assert tokens == made.model.greedy(prompt, 2)


def test_a_size_too_large_to_capture_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is too short for a graph the step has run already; it is tried once, and again after memory was given back."""
    tried: list[int] = []

    def too_large(self: Any, inputs: DecodeInputs, kind: int | None, capturing: Any) -> Any:
        tried.append(len(inputs.slots))
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(PaddedDecodes, "_captured", too_large)
    monkeypatch.setattr("paddock.execution.padded._Capturing", object)
    padded = PaddedDecodes(
        lambda inputs, kind: inputs.positions * 10,
        most=8,
        scratch_slot=8,
        scratch_kv_slot=0,
        device=torch.device("cpu"),
        capture=True,
    )
    table = SlotTable(8, 64, 4)
    host = lay_out(Step(0, decode_slots=[4, 2, 6], decode_positions=[7, 0, 11]), table)
    for _ in range(2):
        assert padded.run(host, 0)[1].tolist() == [70, 0, 110]
    assert tried == [4]
    padded.forget()
    padded.run(host, 0)
    assert tried == [4, 4]
