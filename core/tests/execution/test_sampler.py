"""Choosing tokens: greedy, drawn, filtered, seeded, and rows that cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paddock.execution.sampling_reference import most_likely
from paddock.request import SamplingParams
from paddock.scheduling.step import NOT_FINITE

VOCAB = 50


def normal(rows: int, vocab: int = VOCAB, seed: int = 0) -> Any:
    """Return random logits."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def frequencies(bench: Any, admit: Any, logits: Any, params: Any, steps: int = 60) -> Any:
    """Return how often each token is drawn from a row of logits, over the bench's slots, each of its own seed, and steps."""
    slots = range(64)
    bench.admit(*(admit(slot, params, seed=slot) for slot in slots))
    tokens = [token for _ in range(steps) for token in bench.tokens(logits.expand(len(slots), -1))]
    return len(tokens), np.bincount(tokens, minlength=logits.shape[1]) / len(tokens)


def test_greedy_rows_take_the_most_likely_token(sampler_bench: Any, admit: Any) -> None:
    """Temperature 0 gives each row's argmax."""
    bench, logits = sampler_bench(VOCAB), normal(4)
    bench.admit(*(admit(slot, SamplingParams(temperature=0.0)) for slot in range(4)))
    assert bench.tokens(logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [50, 256, 1024])
def test_the_most_likely_token_is_the_first_of_equals(vocab: int) -> None:
    """Whether or not it is found by blocks, the best of rounded logits is torch's, and NaN shows in the value."""
    logits = (normal(20, vocab) * 2).round()
    logits[3, vocab - 1] = torch.nan
    logits[4] = -torch.inf
    top, token = most_likely(logits)
    expected = logits.max(dim=-1)
    assert torch.equal(top.nan_to_num(99.0), expected.values.nan_to_num(99.0))
    assert torch.equal(token, expected.indices)
    assert top[3].isnan()


def test_drawn_tokens_follow_the_softmax_of_scaled_logits(sampler_bench: Any, admit: Any) -> None:
    """Frequencies at a temperature match the softmax (chi-square, fixed seed)."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    count, found = frequencies(sampler_bench(5, num_slots=64), admit, logits, SamplingParams(temperature=1.7))
    expected = (logits[0] / 1.7).softmax(-1).numpy()
    assert (count * (found - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom, p = 0.001


def test_filtered_tokens_follow_what_the_filters_leave(sampler_bench: Any, admit: Any) -> None:
    """Frequencies under temperature, min-p, top-k and top-p match the renormalised rest (chi-square, fixed seed)."""
    logits = torch.tensor([[2.0, 1.9, 1.5, 1.0, 0.0, -3.0]])
    params = SamplingParams(temperature=1.5, min_p=0.05, top_k=4, top_p=0.8)
    count, found = frequencies(sampler_bench(6, num_slots=64), admit, logits, params)
    alive = (logits[0, :3] / 1.5).softmax(-1).numpy()  # top-p 0.8 leaves three of the four
    assert found[3:].sum() == 0
    assert (count * (found[:3] - alive) ** 2 / alive).sum() < 13.8  # 2 degrees of freedom, p = 0.001


def test_top_k_one_and_tiny_top_p_are_greedy(sampler_bench: Any, admit: Any) -> None:
    """The narrowest filters leave the best token, whatever the temperature."""
    bench, logits = sampler_bench(VOCAB), normal(3)
    narrow: tuple[dict[str, Any], ...] = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
    bench.admit(*(admit(slot, SamplingParams(temperature=5.0, **one)) for slot, one in enumerate(narrow)))
    assert bench.tokens(logits) == logits.argmax(-1).tolist()


def test_seeded_tokens_ignore_neighbours_slot_and_step(sampler_bench: Any, admit: Any) -> None:
    """A seeded sequence draws the same tokens alone and among any others, in any slot and row, with any features about."""
    seeded = SamplingParams(temperature=0.9, top_p=0.9, seed=7)
    stream = [normal(1, seed=step) for step in range(12)]
    alone = sampler_bench(VOCAB)
    alone.admit(admit(0, seeded, seed=7))
    expected = [alone.tokens(logits)[0] for logits in stream]
    crowd = sampler_bench(VOCAB, seed=99)
    others = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=5),
        SamplingParams(presence_penalty=1.0, logprobs=2),
        SamplingParams(logit_bias={3: 2.0}),
    ]
    crowd.admit(*(admit(slot, params, seed=None) for slot, params in enumerate(others)))
    crowd.tokens(normal(4, seed=50))
    crowd.admit(admit(6, seeded, seed=7))
    found = []
    for step, logits in enumerate(stream):
        order = [6, 0, 1, 2, 3] if step % 2 else [2, 6, 0]
        rows = torch.cat([logits if slot == 6 else normal(1, seed=1000 + slot) for slot in order])
        found.append(crowd.tokens(rows, order)[order.index(6)])
    assert found == expected


def test_a_resumed_sequence_draws_as_if_never_interrupted(sampler_bench: Any, admit: Any) -> None:
    """Admission with generated tokens continues the noise at their count."""
    params, stream = SamplingParams(seed=3), [normal(1, seed=step) for step in range(8)]
    whole, resumed = sampler_bench(VOCAB), sampler_bench(VOCAB)
    whole.admit(admit(0, params, seed=3))
    expected = [whole.tokens(logits)[0] for logits in stream]
    resumed.admit(admit(5, params, output=expected[:4], seed=3))
    assert [resumed.tokens(logits)[0] for logits in stream[4:]] == expected[4:]


def test_unseeded_sequences_differ_and_the_engine_seed_repeats_them(sampler_bench: Any, admit: Any) -> None:
    """Two unseeded sequences draw different tokens; an engine of the same seed draws the same ones again."""

    def run(seed: int) -> Any:
        bench = sampler_bench(VOCAB, seed=seed)
        bench.admit(*(admit(slot, SamplingParams(), seed=None) for slot in range(2)))
        return [bench.tokens(torch.zeros(2, VOCAB)) for _ in range(10)]

    first = run(1)
    assert [row[0] for row in first] != [row[1] for row in first]
    assert first == run(1) != run(2)


def test_unusable_logits_are_marked_for_their_row_only(sampler_bench: Any, admit: Any) -> None:
    """NaN, +inf and all -inf mark a row, greedy, drawn or filtered; its neighbours and rows with some -inf are sampled."""
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(presence_penalty=1.0),
    ):
        bench, logits = sampler_bench(VOCAB), normal(5)
        logits[0, 7], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
        logits[3, 1:] = -torch.inf
        bench.admit(*(admit(slot, params) for slot in range(5)))
        tokens = bench.tokens(logits)
        assert tokens[:3] == [NOT_FINITE] * 3
        assert tokens[3] == 0
        assert 0 <= tokens[4] < VOCAB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_give_the_tokens_of_the_same_in_float32(sampler_bench: Any, admit: Any, dtype: torch.dtype) -> None:
    """Greedy, drawn, filtered, edited and penalised rows, and their logprobs, of which the model's own stay as they were."""
    ways = [
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=1.1, top_k=5, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=2),
        SamplingParams(temperature=0.7, logit_bias={3: 2.5}, logprobs=1),
    ]
    given = (normal(len(ways)) * 3).to(dtype)
    found = []
    for logits in (given, given.float()):
        bench = sampler_bench(VOCAB)
        bench.admit(*(admit(slot, way, seed=slot) for slot, way in enumerate(ways)))
        found.append([bench.sample(logits) for _ in range(4)])
    for narrow, wide in zip(*found, strict=True):
        assert torch.equal(narrow.token_R, wide.token_R)
        for name in ("top_RN", "top_ids_RN", "chosen_R", "rank_R"):
            assert torch.equal(getattr(narrow.logprobs, name), getattr(wide.logprobs, name))


def test_many_rows_are_drawn_as_few_are(sampler_bench: Any, admit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing some rows at a time changes nothing."""

    def run() -> Any:
        bench = sampler_bench(VOCAB, num_slots=16)
        bench.admit(*(admit(slot, SamplingParams(top_p=0.9 if slot % 2 else 1.0), seed=slot) for slot in range(16)))
        return bench.tokens(normal(16))

    whole = run()
    monkeypatch.setattr("paddock.execution.sampling_reference._DRAW_ELEMENTS", 3 * VOCAB)
    assert run() == whole


def test_a_slot_forgets_its_last_holder(sampler_bench: Any, admit: Any) -> None:
    """A greedy sequence in a slot that drew, was biased and penalised before is greedy."""
    bench, logits = sampler_bench(VOCAB), normal(1)
    heavy = SamplingParams(top_k=3, presence_penalty=2.0, repetition_penalty=3.0, logit_bias={1: 50.0}, logprobs=1)
    bench.admit(admit(0, heavy, bad_words=[[4, 5]]))
    bench.tokens(logits)
    bench.admit(admit(0, SamplingParams(temperature=0.0)))
    sampled = bench.sample(logits)
    assert sampled.token_R.tolist() == logits.argmax(-1).tolist()
    assert sampled.logprobs is None


def test_counts_that_found_no_memory_are_made_again(sampler_bench: Any, admit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ran out half way, the sequence admitted anew is penalised like any other."""
    bench, cat, left = sampler_bench(VOCAB), torch.cat, [1]

    def cat_once(*given: Any, **how: Any) -> Any:
        if not left:
            raise torch.OutOfMemoryError("no room for a second table")
        left.pop()
        return cat(*given, **how)

    penalised = admit(3, SamplingParams(temperature=0.0, repetition_penalty=1e6), prompt=(7,))
    with monkeypatch.context() as cramped:
        cramped.setattr(torch, "cat", cat_once)
        with pytest.raises(torch.OutOfMemoryError):
            bench.admit(penalised)
    bench.admit(penalised)
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 9] = 2.0, 1.0
    assert bench.tokens(logits) == [9]
