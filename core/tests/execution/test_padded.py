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
from paddock.execution.padded import PaddedSteps
from paddock.execution.padded_inputs import Scratch, StepInputs
from paddock.execution.runner import SmallSteps
from paddock.execution.slots import SlotTable
from paddock.planning.padding import (
    CHUNK_COUNTS,
    CHUNK_TOKENS,
    MIXED_GRAPHS,
    Padding,
    StepShape,
    mixed_sizes,
    padded_sizes,
    rehearsed_sizes,
)
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


@given(st.integers(1, 5000))
def test_kernels_are_compiled_for_a_padded_size_of_each_power_of_two(most: int) -> None:
    """The most there can be is one of them, and no two are further apart than a factor of two."""
    sizes = rehearsed_sizes(most)
    assert (sizes[0], sizes[-1]) == (1, most)
    assert {*sizes} <= {*padded_sizes(most)}
    assert all(smaller < size <= 2 * smaller for smaller, size in pairwise(sizes))


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

    plain, padded = (_run(paged_runner(way), admission, ways) for way in (SmallSteps.AS_THEY_COME, SmallSteps.PADDED))
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
    """Give a runner of steps on the CPU, what each of its captures is to come to, and what they were given: shape and pool."""
    outcomes: list[Exception | None] = []
    given: list[tuple[StepShape, Any]] = []

    def captured(self: Any, inputs: StepInputs, kind: int | None, capturing: Any) -> Any:
        given.append((inputs.shape, capturing))
        outcome = outcomes.pop(0) if outcomes else None
        if outcome is not None:
            raise outcome
        return Recorded()

    monkeypatch.setattr(PaddedSteps, "_captured", captured)
    monkeypatch.setattr("paddock.execution.padded._Capturing", Recorded)
    scratch = Scratch(slot=8, kv_slot=0)
    padded = PaddedSteps(_tenfold, most=8, scratch=scratch, device=torch.device("cpu"), capture=True)
    return padded, outcomes, given


def _tenfold(inputs: StepInputs, kind: int | None) -> torch.Tensor:
    """Return ten times the position of each sampled row's token."""
    return inputs.positions_T.index_select(0, inputs.sampled_R) * 10 if inputs.shape.chunks else inputs.positions_T * 10


def _run_step(padded: PaddedSteps, decodes: list[int], *chunks: list[int]) -> list[int]:
    """Return what a step gives: decodes at positions that are their slots, and a chunk of each prompt from its start."""
    step = Step(0, decode_slots=decodes, decode_positions=decodes)
    step.prefills = [PrefillChunk(7 - i, 0, chunk, True) for i, chunk in enumerate(chunks)]
    host = lay_out(step, SlotTable(8, 1024, 4))
    shape = padded.shape_for(host)
    assert shape is not None
    rows: list[int] = padded.run(host, shape, 0)[1].tolist()
    return rows


@pytest.mark.parametrize(
    "shortage", [torch.OutOfMemoryError("no room for a graph"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_a_shape_too_large_to_capture_runs_all_the_same(captures: Any, shortage: Exception) -> None:
    """Where memory is too short for a graph the step has run already; it is tried once, and again after memory was given back."""
    padded, outcomes, given = captures
    outcomes += [shortage, shortage]
    for _ in range(2):
        assert _run_step(padded, [4, 2, 6]) == [40, 20, 60]
    assert [shape.decodes for shape, _ in given] == [4]
    padded.forget()
    _run_step(padded, [4, 2, 6])
    assert [shape.decodes for shape, _ in given] == [4, 4]


def test_any_other_fault_of_a_capture_is_told(captures: Any) -> None:
    """A step that cannot be a graph for another reason is an error, not a warning, and says what to do."""
    padded, outcomes, _ = captures
    outcomes.append(torch.AcceleratorError("operation not permitted when stream is capturing"))
    with pytest.raises(KernelError, match=r"1 sequences and 1 tokens cannot be captured: .*not permitted") as caught:
        _run_step(padded, [1])
    assert "--enforce-eager" in caught.value.fix


def test_a_pool_without_graphs_is_not_captured_into(captures: Any) -> None:
    """Once its only graph has failed torch takes it no more; while another lives in it, it serves."""
    padded, outcomes, given = captures
    outcomes += [torch.OutOfMemoryError("none"), None, torch.OutOfMemoryError("none"), None]
    for count in (1, 2, 4, 8):
        _run_step(padded, list(range(count)))
    first, second, third, fourth = (pool for _, pool in given)
    assert first is not second
    assert second is third is fourth


def test_a_shape_with_prompts_in_it_is_captured_when_it_is_met_again(captures: Any) -> None:
    """Once is no reason to keep a graph of a shape among so many; and no more than so many are kept."""
    padded, _, given = captures
    assert _run_step(padded, [3], [5] * 9, [6] * 4) == [30, 80, 30]
    assert given == []
    assert _run_step(padded, [5], [5] * 3, [6] * 10) == [50, 20, 90]
    assert [shape for shape, _ in given] == [StepShape(decodes=1, chunks=2, chunk_tokens=16)]
    padded._graphs.clear()
    for tokens in CHUNK_TOKENS:
        for count in (1, 2, 4):
            for _ in range(2):
                _run_step(padded, list(range(count)), [1] * tokens)
    assert len(padded._graphs) == MIXED_GRAPHS < 3 * len(CHUNK_TOKENS)


@given(st.integers(1, 2000), st.integers(0, 2000), st.integers(1, 12), st.integers(1, 700))
def test_a_padded_shape_holds_the_step(most: int, decodes: int, chunks: int, tokens: int) -> None:
    """Every number is at least the step's, and a step of many tokens of prompts, or of many prompts, runs as it comes."""
    decodes = min(decodes, most)
    shape = StepShape(decodes=decodes, chunks=chunks, chunk_tokens=tokens)
    padded = Padding(most).padded(shape)
    if chunks > CHUNK_COUNTS[-1] or tokens > CHUNK_TOKENS[-1]:
        assert padded is None
    else:
        assert padded is not None
        assert decodes <= padded.decodes <= most
        assert (chunks <= padded.chunks, tokens <= padded.chunk_tokens) == (True, True)
        assert padded.decodes in mixed_sizes(most)
