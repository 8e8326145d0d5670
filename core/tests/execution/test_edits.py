"""Logit bias, bad words, min_tokens and penalties against a plain, token by token reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.request import SamplingParams

VOCAB = 12


def plain_logits(logits: Any, params: Any, prompt: Any, output: Any, stop_ids: Any, bad_words: Any) -> Any:
    """Return one row's logits as a greedy choice sees them, edit by edit."""
    row = [float(x) for x in logits]
    for token, bias in params.logit_bias:
        row[token] += bias
    for word in bad_words:
        if list(word[:-1]) == output[len(output) - len(word) + 1 :]:
            row[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in stop_ids:
            row[token] = -np.inf
    for token in set(prompt) | set(output):
        row[token] *= params.repetition_penalty if row[token] <= 0 else 1 / params.repetition_penalty
    for token in set(output):
        row[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return row


token_id = st.integers(0, VOCAB - 1)
sequence = st.fixed_dictionaries(
    {
        "params": st.builds(
            SamplingParams,
            temperature=st.just(0.0),
            max_tokens=st.just(50),
            repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
            presence_penalty=st.sampled_from([0.0, 1.1, -0.6]),
            frequency_penalty=st.sampled_from([0.0, 0.45, -0.3]),
            logit_bias=st.dictionaries(token_id, st.sampled_from([-3.0, 0.4, 2.0]), max_size=3),
            min_tokens=st.integers(0, 4),
        ),
        "prompt": st.lists(token_id, min_size=1, max_size=6),
        "output": st.lists(token_id, max_size=4),
        "stop_ids": st.frozensets(token_id, max_size=2),
        "bad_words": st.lists(st.lists(token_id, min_size=1, max_size=3), max_size=3),
    }
)


@settings(max_examples=60, deadline=None)
@given(sequences=st.lists(sequence, min_size=2, max_size=4), seed=st.integers(0, 2**16))
def test_edited_choices_follow_the_plain_reference(sampler_bench: Any, admit: Any, sequences: Any, seed: int) -> None:
    """Over several steps in changing company, sequences of different edits choose what each would choose by the plain rules.

    Half way through, the first sequence's slot goes to a copy of the last one.
    """
    bench, generator = sampler_bench(VOCAB), torch.Generator().manual_seed(seed)
    bench.admit(*(admit(slot, seed=0, **parts) for slot, parts in enumerate(sequences)))
    outputs = [list(parts["output"]) for parts in sequences]
    for step in range(6):
        if step == 3:
            sequences = [sequences[-1], *sequences[1:]]
            outputs[0] = list(sequences[0]["output"])
            bench.admit(admit(0, seed=0, **sequences[0]))
        slots = torch.randperm(len(sequences), generator=generator).tolist()[: len(sequences) - step % 2]
        logits = torch.randn(len(slots), VOCAB, generator=generator)
        for r, (slot, token) in enumerate(zip(slots, bench.tokens(logits, slots), strict=True)):
            parts = sequences[slot]
            names = ("params", "prompt", "stop_ids", "bad_words")
            params, prompt, stop_ids, bad_words = (parts[name] for name in names)
            row = plain_logits(logits[r], params, prompt, outputs[slot], stop_ids, bad_words)
            assert row[token] >= max(row) - 1e-5
            outputs[slot].append(token)


def test_stop_ids_beyond_the_vocabulary_are_no_concern(sampler_bench: Any, admit: Any) -> None:
    """A stop id the model cannot produce does not disturb min_tokens."""
    bench = sampler_bench(VOCAB)
    params = SamplingParams(temperature=0.0, min_tokens=2)
    bench.admit(admit(0, params, stop_ids=frozenset({3, VOCAB + 7})))
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 1.0
    assert [bench.tokens(logits)[0] == 3 for _ in range(3)] == [False, False, True]


def test_min_tokens_may_be_any_number(sampler_bench: Any, admit: Any) -> None:
    """A min_tokens that no 32 bits hold bars the stop ids for good, and is nobody else's error."""
    bench = sampler_bench(VOCAB)
    bench.admit(admit(0, SamplingParams(temperature=0.0, min_tokens=2**40, max_tokens=None), stop_ids=frozenset({3})))
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 1.0
    assert [bench.tokens(logits)[0] for _ in range(3)] == [0, 0, 0]


def test_longer_bad_words_arriving_later_keep_what_others_remember(sampler_bench: Any, admit: Any) -> None:
    """A sequence half way through a bad word is stopped though a longer word of another came in between."""
    bench, logits = sampler_bench(VOCAB), torch.arange(VOCAB, dtype=torch.float32)[None]
    bench.admit(admit(0, SamplingParams(temperature=0.0), bad_words=[[11, 11]]))
    assert bench.tokens(logits, [0]) == [11]
    bench.admit(admit(1, SamplingParams(temperature=0.0), bad_words=[[1, 2, 3, 4]]))
    assert bench.tokens(logits, [0]) == [10]


def test_penalties_change_drawn_tokens_too(sampler_bench: Any, admit: Any) -> None:
    """A strong frequency penalty drives a drawn sequence through every token before it repeats one."""
    bench = sampler_bench(VOCAB)
    bench.admit(admit(0, SamplingParams(temperature=0.01, frequency_penalty=2.0)))
    logits = torch.linspace(0.0, 1.0, VOCAB)[None]
    assert sorted(bench.tokens(logits)[0] for _ in range(VOCAB)) == list(range(VOCAB))


def test_a_slots_next_sequence_brings_its_own_edits(sampler_bench: Any, admit: Any) -> None:
    """A biased sequence after a biased one, in the same slot and row, gets its own bias."""
    bench, logits = sampler_bench(VOCAB), torch.zeros(1, VOCAB)
    for token in (3, 7):
        bench.admit(admit(0, SamplingParams(temperature=0.0, logit_bias={token: 1.0})))
        assert bench.tokens(logits) == [token]
