"""Decodes at padded sizes: the same tokens, however many rows are padding, and whatever the sampler is asked for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.errors import KernelError
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


class Recorded:
    """Stands for a captured step whose graph nobody replays."""


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a runner of steps on the CPU, what each of its captures is to come to, and what they were given: size and pool."""
    outcomes: list[Exception | None] = []
    given: list[tuple[int, Any]] = []

    def captured(self: Any, inputs: DecodeInputs, kind: int | None, capturing: Any) -> Any:
        given.append((len(inputs.slots), capturing))
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return Recorded()

    monkeypatch.setattr(PaddedDecodes, "_captured", captured)
    monkeypatch.setattr("paddock.execution.padded._Capturing", Recorded)
    padded = PaddedDecodes(
        lambda inputs, kind: inputs.positions * 10,
        most=8,
        scratch_slot=8,
        scratch_kv_slot=0,
        device=torch.device("cpu"),
        capture=True,
    )
    return padded, outcomes, given


def _decodes_of(slots: list[int]) -> Any:
    """Return a step of decodes at positions that are their slots."""
    return lay_out(Step(0, decode_slots=slots, decode_positions=slots), SlotTable(8, 64, 4))


@pytest.mark.parametrize(
    "shortage", [torch.OutOfMemoryError("no room for a graph"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_a_size_too_large_to_capture_runs_all_the_same(captures: Any, shortage: Exception) -> None:
    """Where memory is too short for a graph the step has run already; it is tried once, and again after memory was given back."""
    padded, outcomes, given = captures
    outcomes += [shortage, shortage]
    host = _decodes_of([4, 2, 6])
    for _ in range(2):
        assert padded.run(host, 0)[1].tolist() == [40, 20, 60]
    assert [size for size, _ in given] == [4]
    padded.forget()
    padded.run(host, 0)
    assert [size for size, _ in given] == [4, 4]


def test_any_other_fault_of_a_capture_is_told(captures: Any) -> None:
    """A step that cannot be a graph for another reason is an error, not a warning, and says what to do."""
    padded, outcomes, _ = captures
    outcomes.append(torch.AcceleratorError("operation not permitted when stream is capturing"))
    with pytest.raises(KernelError, match=r"1 sequences cannot be captured: .*not permitted") as caught:
        padded.run(_decodes_of([1]), 0)
    assert "--enforce-eager" in caught.value.fix


def test_a_pool_without_graphs_is_not_captured_into(captures: Any) -> None:
    """Once its only graph has failed torch takes it no more; while another lives in it, it serves."""
    padded, outcomes, given = captures
    outcomes += [torch.OutOfMemoryError("none"), None, torch.OutOfMemoryError("none"), None]
    for count in (1, 2, 4, 8):
        padded.run(_decodes_of(list(range(count))), 0)
    first, second, third, fourth = (pool for _, pool in given)
    assert first is not second
    assert second is third is fourth
