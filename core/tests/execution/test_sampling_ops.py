"""The ops that choose tokens: what their definitions promise, and that the sampler asks whichever are bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paddock.execution import filters, randomness, sampling_reference
from paddock.execution.sampler import Sampler
from paddock.execution.sampling_ops import SAMPLING_OP_NAMES, SamplingOps
from paddock.execution.sampling_state import DRAWN, FILTERED
from paddock.plugins import builtin
from paddock.request import GREEDY_EPSILON, SamplingParams
from paddock.scheduling.step import NOT_FINITE

CPU = torch.device("cpu")
VOCAB, ROWS = 300, 12
OFF = (torch.zeros(ROWS, dtype=torch.int32), torch.ones(ROWS), torch.zeros(ROWS))  # top-k, top-p, min-p
GREEDY = SamplingParams(temperature=0.0)


def logits(rows: int = ROWS, seed: int = 0) -> Any:
    """Return random logits."""
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def noise(rows: int = ROWS) -> Any:
    """Return seeds and positions."""
    words = torch.tensor([randomness.seed_words(seed) for seed in range(rows)], dtype=torch.int32)
    return words, torch.arange(rows, dtype=torch.int32)


def test_every_sampling_op_is_announced_and_defined() -> None:
    """The core's plugin brings each op, and each stands in the reference."""
    assert set(builtin.SAMPLING_OPS) == SAMPLING_OP_NAMES
    assert all(getattr(SamplingOps(), name) is getattr(sampling_reference, name) for name in SAMPLING_OP_NAMES)


def test_sampling_ops_bind_what_is_named_and_fall_back_to_the_reference() -> None:
    """Binding one op leaves the others to their twins."""

    def most_likely(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_RV[:, 0], torch.zeros(len(logits_RV), dtype=torch.int64)

    ops = SamplingOps.bind({"most_likely": most_likely})
    assert ops.most_likely is most_likely
    assert ops.draw is sampling_reference.draw


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_as_float32(dtype: torch.dtype) -> None:
    """The most likely and the drawn tokens are those of the same numbers in float32."""
    half, temperature = logits().to(dtype), torch.full((ROWS,), 0.7)
    best = sampling_reference.most_likely(half)
    assert best[0].dtype == torch.float32
    assert all(map(torch.equal, best, sampling_reference.most_likely(half.float())))
    drawn = sampling_reference.draw(half, *best, temperature, *noise())
    assert torch.equal(drawn, sampling_reference.draw(half.float(), *best, temperature, *noise()))


def test_rows_of_temperature_0_keep_their_token() -> None:
    """Drawn and greedy rows share a call, with filters or without."""
    rows, temperature = logits(), torch.arange(ROWS) % 3 * 0.6
    top, token = sampling_reference.most_likely(rows)
    for filtered in ((), (torch.full((ROWS,), 5, dtype=torch.int32), torch.full((ROWS,), 0.9), torch.zeros(ROWS))):
        op = sampling_reference.draw_filtered if filtered else sampling_reference.draw
        drawn = op(rows, top, token, temperature, *filtered, *noise())
        assert torch.equal(drawn[::3], token[::3])
        assert not torch.equal(drawn, token)


def test_filters_turned_off_leave_the_draw_as_it_is() -> None:
    """`draw_filtered` is `draw` where nothing is filtered, beside rows where something is."""
    rows, temperature = logits(), torch.full((ROWS,), 1.3)
    best = sampling_reference.most_likely(rows)
    drawn = sampling_reference.draw(rows, *best, temperature, *noise())
    assert torch.equal(sampling_reference.draw_filtered(rows, *best, temperature, *OFF, *noise()), drawn)
    top_k = OFF[0].clone()
    top_k[::2] = 1
    mixed = sampling_reference.draw_filtered(rows, *best, temperature, top_k, *OFF[1:], *noise())
    assert torch.equal(mixed[1::2], drawn[1::2])
    assert torch.equal(mixed[::2], best[1][::2])


def test_sorting_all_finds_the_threshold_that_few_candidates_give() -> None:
    """What a GPU does, which may not look at values, agrees with what a CPU does, which may."""
    scaled = (logits() * 4).round() / 4
    scaled -= scaled.amax(-1, keepdim=True)
    top_k, top_p = torch.tensor([0, 3, 40, 300] * 3), torch.tensor([1.0, 1.0, 1.0, 0.9, 0.5, 1e-6, 0.9] + [1.0] * 5)
    min_p = torch.tensor([0.0, 0.0, 0.1] * 4)
    values, floor = scaled.sort(dim=-1, descending=True).values, min_p.log()[:, None]
    found, _ = filters._threshold(scaled, values, floor, top_k, top_p, nucleus=True)
    assert torch.equal(found, filters.threshold(scaled, top_k.int(), top_p, min_p))


def test_no_rows_give_no_tokens() -> None:
    """A step that samples nothing is no special case."""
    empty = torch.zeros(0)
    best = sampling_reference.most_likely(torch.zeros(0, VOCAB))
    whole = (torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    assert sampling_reference.draw(torch.zeros(0, VOCAB), *best, empty, *whole).tolist() == []
    filtered = (torch.zeros(0, dtype=torch.int32), empty, empty)
    assert sampling_reference.draw_filtered(torch.zeros(0, VOCAB), *best, empty, *filtered, *whole).tolist() == []


MIXES = {
    0: [GREEDY, SamplingParams(temperature=GREEDY_EPSILON / 2, top_k=3)],
    DRAWN: [GREEDY, SamplingParams(), SamplingParams(temperature=0.4)],
    FILTERED: [
        GREEDY,
        SamplingParams(),
        SamplingParams(temperature=1.5, top_k=9),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.05, top_p=0.95, top_k=50),
        SamplingParams(temperature=0.0, top_p=0.5),
    ],
}


@pytest.mark.parametrize("kind", MIXES)
def test_plain_takes_the_tokens_that_sample_takes(sampler_bench: Any, admit: Any, kind: int) -> None:
    """From tables alone, all rows through one op: greedy, drawn and filtered rows and unusable ones, step after step."""
    mix = MIXES[kind]
    bench = sampler_bench(VOCAB)
    bench.admit(*(admit(slot, mix[slot % len(mix)], seed=slot) for slot in range(8)))
    for step in range(6):
        rows = logits(8, seed=step)
        rows[step, 17], rows[step + 1] = torch.nan, -torch.inf
        positions = torch.tensor([bench.lengths[slot] - 1 for slot in range(8)], dtype=torch.int32)  # prompts are of one token
        plain = bench.sampler.plain(rows, torch.arange(8), positions, kind=kind)
        assert plain.tolist() == bench.tokens(rows)
        assert plain[step] == plain[step + 1] == NOT_FINITE


def test_padding_s_slot_stays_greedy(sampler_bench: Any, admit: Any) -> None:
    """Rows of the slot after the last are greedy whatever was admitted, so that padding costs no draw."""
    bench, rows = sampler_bench(VOCAB, num_slots=4), logits(6)
    bench.admit(*(admit(slot, SamplingParams(temperature=9.0, top_p=0.9)) for slot in range(4)))
    slots, positions = torch.tensor([0, 1, 2, 3, 4, 4]), torch.zeros(6, dtype=torch.int32)
    plain = bench.sampler.plain(rows, slots, positions, kind=FILTERED)
    assert plain[4:].tolist() == rows[4:].argmax(-1).tolist()


def test_the_sampler_asks_the_ops_it_was_given() -> None:
    """A bound op decides, in a captured step as in any other."""

    def second(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top_R2, token_R2 = logits_RV.topk(2, dim=-1)
        return top_R2[:, 1], token_R2[:, 1]

    sampler = Sampler(num_slots=4, vocab_size=VOCAB, device=CPU, seed=0, ops=SamplingOps.bind({"most_likely": second}))
    rows = logits(3)
    plain = sampler.plain(rows, torch.arange(3), torch.zeros(3, dtype=torch.int32), kind=0)
    assert torch.equal(plain, rows.topk(2, dim=-1).indices[:, 1])
