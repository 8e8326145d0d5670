"""Logprobs describe the model's own distribution, whatever sampling does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paddock.execution.logprobs import top_logprobs
from paddock.request import SamplingParams

VOCAB = 20


def test_rows_list_the_chosen_token_first_and_the_most_likely_after() -> None:
    """Values are log_softmax of the raw logits, ranks count from 1, and the chosen token is not listed twice."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    order, expected = logits.argsort(-1, descending=True), logits.log_softmax(-1)
    chosen = torch.tensor([int(order[0, 0]), int(order[1, 6]), int(order[2, 2])])
    rows = top_logprobs(logits, chosen, 4).rows([4, 4, 0])
    assert list(rows[0]) == order[0, :4].tolist()
    assert list(rows[1]) == [int(order[1, 6]), *order[1, :4].tolist()]
    assert list(rows[2]) == [int(order[2, 2])]
    assert [entry.rank for entry in rows[1].values()] == [7, 1, 2, 3, 4]
    for r, row in enumerate(rows):
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(float(expected[r, token]), abs=1e-5)


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    """Asking for more than the vocabulary holds lists the vocabulary."""
    rows = top_logprobs(torch.zeros(1, 5), torch.tensor([2]), 50).rows([50])
    assert sorted(rows[0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("edited", [{"logit_bias": {0: 30.0}}, {"presence_penalty": 2.0, "repetition_penalty": 1.5}])
@pytest.mark.parametrize("neighbour", [None, SamplingParams(temperature=0.0)])
def test_logprobs_are_raw_under_every_edit(sampler_bench: Any, admit: Any, edited: Any, neighbour: Any) -> None:
    """Temperature, filters, bias and penalties leave the reported distribution alone."""
    bench = sampler_bench(VOCAB)
    params = SamplingParams(temperature=3.0, top_k=3, logprobs=2, **edited)
    bench.admit(admit(0, params, prompt=[0, 1, 2], output=[3, 4]))
    if neighbour is not None:
        bench.admit(admit(1, neighbour))
    logits = torch.randn(len(bench.lengths), VOCAB, generator=torch.Generator().manual_seed(2))
    sampled = bench.sample(logits)
    (row,) = sampled.logprobs.rows([2])
    expected = logits[0].log_softmax(-1)
    assert next(iter(row)) == int(sampled.token_R[0])
    for token, entry in row.items():
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert entry.rank == 1 + int((logits[0] > logits[0, token]).sum())
