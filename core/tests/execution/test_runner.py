"""Steps made by hand, run on a model whose logits depend on every K and V read back from the pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paddock.request import SamplingParams
from paddock.scheduling.step import PrefillChunk, Step

GREEDY = SamplingParams(temperature=0.0)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def prefill(slot: int, start: int, tokens: Any, *, samples: Any = True, **more: Any) -> Any:
    """Return a step of one chunk."""
    return Step(0, prefills=[PrefillChunk(slot, start, tokens, samples)], **more)


def decode(slots: Any, positions: Any, pages: Any = ()) -> Any:
    """Return a step of decodes."""
    return Step(0, decode_slots=slots, decode_positions=positions, pages=list(pages))


def test_prefill_and_decodes_give_the_models_tokens(rig: Any, admit: Any) -> None:
    """A prompt in one chunk, then decodes fed on the device, over scattered pages, give the greedy continuation."""
    model, runner = (made := rig()).model, made.runner
    tokens = (
        runner.launch(prefill(2, 0, PROMPT, admissions=[admit(2, GREEDY, prompt=PROMPT)], pages=[(2, 0, [9, 4])]))
        .result()
        .token_ids
    )
    for i in range(7):
        grant = [(2, (8 + i) // 4, [20 + i])] if (8 + i) % 4 == 0 else []
        tokens += runner.launch(decode([2], [8 + i], grant)).result().token_ids
    assert tokens == model.greedy(PROMPT, 8)


@pytest.mark.parametrize("sparing", [True, False])
def test_chunks_mixed_with_decodes_change_nothing(rig: Any, admit: Any, sparing: bool) -> None:
    """A prompt in two chunks beside another sequence's decodes gives both what they get alone, whatever rows a model returns."""
    model, runner = (made := rig(sparing=sparing)).model, made.runner
    other = [7, 7, 7]
    first = prefill(1, 0, PROMPT[:5], samples=False, admissions=[admit(1, GREEDY, prompt=PROMPT)], pages=[(1, 0, [3, 30])])
    first.prefills.append(PrefillChunk(0, 0, other, True))
    first.admissions.append(admit(0, GREEDY, prompt=other))
    first.pages.append((0, 0, [12, 13]))
    found = runner.launch(first).result().token_ids
    assert found == model.greedy(other, 1)
    second = decode([0], [3])
    second.prefills = [PrefillChunk(1, 5, PROMPT[5:], True)]
    both = runner.launch(second).result().token_ids
    assert both == [model.greedy(other, 2)[1], model.greedy(PROMPT, 1)[0]]


@pytest.mark.parametrize("sparing", [True, False])
def test_a_step_that_samples_nothing_computes_no_logits(rig: Any, admit: Any, sparing: bool) -> None:
    """The first chunk of a long prompt gives no tokens and asks the model for none; its K and V are kept."""
    model, runner = (made := rig(sparing=sparing)).model, made.runner
    step = prefill(0, 0, PROMPT[:4], samples=False, admissions=[admit(0, GREEDY, prompt=PROMPT)], pages=[(0, 0, [1, 2])])
    assert runner.launch(step).result().token_ids == []
    assert model.rows_computed == []
    assert runner.launch(prefill(0, 4, PROMPT[4:])).result().token_ids == model.greedy(PROMPT, 1)


def test_a_resumed_sequence_continues(rig: Any, admit: Any) -> None:
    """A sequence admitted anew with its generated tokens, in another slot and other pages, goes on as before."""
    model, runner = (made := rig()).model, made.runner
    whole = model.greedy(PROMPT, 6)
    known = PROMPT + whole[:3]
    step = prefill(5, 0, known, admissions=[admit(5, GREEDY, prompt=PROMPT, output=whole[:3])], pages=[(5, 0, [8, 2, 6])])
    tokens = runner.launch(step).result().token_ids
    tokens += runner.launch(decode([5], [len(known)])).result().token_ids
    assert tokens == whole[3:5]


@pytest.mark.parametrize("sparing", [True, False])
@pytest.mark.parametrize("cut", [8, 5, 1])
def test_prompt_logprobs_do_not_depend_on_chunks(rig: Any, admit: Any, cut: int, sparing: bool) -> None:
    """However a prompt is cut, each token after the first gets its raw logprob and rank, others in the step none."""
    model, runner = (made := rig(sparing=sparing)).model, made.runner
    step = prefill(1, 0, [4, 4, 4], pages=[(1, 0, [7]), (3, 0, [5, 0])], admissions=[admit(1, GREEDY, prompt=[4, 4, 4])])
    step.prefills.append(PrefillChunk(3, 0, PROMPT[:cut], cut == 8))
    step.admissions.append(admit(3, SamplingParams(temperature=0.0, prompt_logprobs=2), prompt=PROMPT))
    found = runner.launch(step).result().prompt_logprobs[1]
    if cut < 8:
        rest = decode([1], [3])
        rest.prefills.append(PrefillChunk(3, cut, PROMPT[cut:], True))
        found += runner.launch(rest).result().prompt_logprobs[0]
    assert len(found) == 7
    for position, row in enumerate(found):
        logits = torch.from_numpy(model.logits_after(PROMPT[: position + 1]))
        expected, token = logits.log_softmax(-1), PROMPT[position + 1]
        assert next(iter(row)) == token
        assert row[token].logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert row[token].rank == 1 + int((logits > logits[token]).sum())
        assert set(logits.topk(2).indices.tolist()) <= set(row)


def test_logprobs_belong_to_the_rows_that_asked(rig: Any, admit: Any) -> None:
    """Of two sampled rows only the one with logprobs has an entry, under its own index, with as many as it asked for."""
    runner = rig().runner
    step = prefill(0, 0, [1, 2], admissions=[admit(0, GREEDY, prompt=[1, 2])], pages=[(0, 0, [0]), (1, 0, [1])])
    step.prefills.append(PrefillChunk(1, 0, [5], True))
    step.admissions.append(admit(1, SamplingParams(temperature=0.0, logprobs=3), prompt=[5]))
    result = runner.launch(step).result()
    assert list(result.logprobs) == [1]
    assert len(result.logprobs[1]) == 3
    assert next(iter(result.logprobs[1])) == result.token_ids[1]


def test_a_row_of_unusable_logits_has_no_logprobs(rig: Any, admit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poisoned row is marked, gives no logprobs and leaves its neighbour alone."""
    model, runner = (made := rig()).model, made.runner
    healthy = model.greedy([1, 2], 1)
    poisoned = model.digest([5])
    row = model._row
    monkeypatch.setattr(model, "_row", lambda digest: row(digest) * (np.float32("nan") if digest == poisoned else 1))
    asks = SamplingParams(temperature=0.0, logprobs=1)
    step = prefill(0, 0, [1, 2], admissions=[admit(0, asks, prompt=[1, 2])], pages=[(0, 0, [0]), (1, 0, [1])])
    step.prefills.append(PrefillChunk(1, 0, [5], True))
    step.admissions.append(admit(1, asks, prompt=[5]))
    result = runner.launch(step).result()
    assert result.token_ids == [*healthy, -1]
    assert list(result.logprobs) == [0]


@pytest.mark.parametrize(
    ("said", "becomes"), [("out of memory", torch.OutOfMemoryError), ("an illegal access", torch.AcceleratorError)]
)
def test_a_shortage_of_the_drivers_is_one_the_engine_knows(
    rig: Any, admit: Any, monkeypatch: pytest.MonkeyPatch, said: str, becomes: type[Exception]
) -> None:
    """Too little memory to launch a graph is taken as the allocator's own; another fault of the device stays what it is."""
    made = rig()

    def fails(*_: object) -> None:
        raise torch.AcceleratorError(f"CUDA error: {said}")

    monkeypatch.setattr(made.model, "forward", fails)
    with pytest.raises(becomes, match=said):
        made.runner.launch(prefill(0, 0, [1, 2], admissions=[admit(0, GREEDY, prompt=[1, 2])], pages=[(0, 0, [0])]))
