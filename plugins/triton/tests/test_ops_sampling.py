"""The kernels that choose tokens against the sampler's own arithmetic.

R rows, V vocabulary; B tokens of a block.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from paddock.execution import randomness
from paddock.execution.sampling_reference import most_likely
from paddock_triton import ops_sampling
from paddock_triton.rows import pieces_of

BLOCK = 1024  # of tokens whose noise a program writes: a row of 65,536 would take the compiler half a minute
SIZES = ((0, 100), (1, 1), (7, 4095), (3, 4097), (1, 12_345), (300, 63))


def test_the_most_likely_token_is_the_samplers(device: torch.device) -> None:
    """The largest logit, and of equal ones the first token, wherever chunks of the vocabulary meet."""
    for rows, vocab in SIZES:
        logits_RV = _logits(rows, vocab, device).mul_(4).round_().div_(4)  # many ties
        _same(ops_sampling.most_likely(logits_RV), most_likely(logits_RV.cpu()))


@pytest.mark.memcheck
def test_nan_and_infinity_show_in_the_largest_logit(device: torch.device) -> None:
    """A row with NaN gives NaN, so that one look at the maxima finds every unusable row."""
    logits_RV = _logits(5, 5000, device)
    logits_RV[0, 4999] = torch.nan
    logits_RV[1, 17] = torch.inf
    logits_RV[2] = -torch.inf
    logits_RV[3, :2500], logits_RV[3, 2500:] = -0.0, 0.0
    logits_RV[4] = -logits_RV[4].abs() - 1
    top_R, token_R = ops_sampling.most_likely(logits_RV)
    assert top_R[:3].isnan().tolist() == [True, False, False]
    assert token_R[:4].tolist() == [4999, 17, 0, 0]
    assert torch.equal(top_R[1:], logits_RV.amax(-1)[1:])


def test_noise_has_the_bits_the_core_defines(device: torch.device) -> None:
    """Every seed, position and token gives the same 32 bits, and the same noise to within its own rounding."""
    vocab, seeds = 4096, [randomness.seed_words(seed) for seed in (0, 1, -5, 2**63)]
    seed_R2, position_R = torch.tensor(seeds, dtype=torch.int32), torch.tensor([0, 1, 70_000, 2**31 - 1], dtype=torch.int32)
    expected_RV = randomness.noise_bits(seed_R2, position_R, randomness.token_terms(vocab, torch.device("cpu")))
    bits_RV = torch.empty(4, vocab, dtype=torch.int32, device=device)
    noise_RV = torch.empty(4, vocab, dtype=torch.float32, device=device)
    _noise_kernel[(4, vocab // BLOCK)](seed_R2.to(device), position_R.to(device), bits_RV, noise_RV, vocab, BLOCK=BLOCK)
    assert torch.equal(bits_RV.cpu(), expected_RV)
    assert (noise_RV.cpu() - randomness.gumbel(expected_RV)).abs().max() < 4e-6


def test_the_smallest_noise_arguments_keep_their_detail(device: torch.device) -> None:
    """Where 1 - u rounds to 1 the winners of long races are told apart."""
    seed_R2, position_R = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    vocab = 1 << 16
    bits_RV = torch.empty(1, vocab, dtype=torch.int32, device=device)
    noise_RV = torch.empty(1, vocab, dtype=torch.float32, device=device)
    _noise_kernel[(1, vocab // BLOCK)](seed_R2.to(device), position_R.to(device), bits_RV, noise_RV, vocab, BLOCK=BLOCK)
    expected_RV = randomness.gumbel(bits_RV.cpu())
    assert noise_RV.isfinite().all()
    assert torch.equal(noise_RV.cpu().topk(20).indices, expected_RV.topk(20).indices)


@pytest.mark.memcheck
def test_a_draw_takes_the_token_the_sampler_takes(device: torch.device) -> None:
    """Seeded draws at any temperature are those of the CPU; near ties may tip, which no seed here meets."""
    rows, vocab = 6, 6000
    logits_RV = _logits(rows, vocab, device)
    seed_R2 = torch.tensor([randomness.seed_words(seed) for seed in range(rows)], dtype=torch.int32)
    position_R, temperature_R = torch.arange(rows, dtype=torch.int32), torch.linspace(0.2, 3.0, rows)
    top_R, token_R = logits_RV.max(-1)
    given = (top_R, token_R, temperature_R.to(device), seed_R2.to(device), position_R.to(device))
    terms_V = randomness.token_terms(vocab, torch.device("cpu"))
    noise_RV = randomness.gumbel(randomness.noise_bits(seed_R2, position_R, terms_V))
    expected_R = ((logits_RV.cpu() - top_R.cpu()[:, None]) / temperature_R[:, None] + noise_RV).argmax(-1)
    assert ops_sampling.draw(logits_RV, *given).tolist() == expected_R.tolist()
    alone = tuple(x[4:5] for x in given)
    assert ops_sampling.draw(logits_RV[4:5], *alone).tolist() == expected_R[4:5].tolist()


def test_a_row_s_token_ignores_how_many_programs_it_has(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven blocks shared by one, two, three, four and seven programs give one likeliest token, its logit, and one draw."""
    rows, blocks = 3, 7
    logits_RV = _logits(rows, blocks * ops_sampling._BLOCK - 40, device).mul_(4).round_().div_(4)
    seed_R2 = torch.tensor([randomness.seed_words(seed) for seed in range(rows)], dtype=torch.int32, device=device)
    rest = (torch.linspace(0.2, 3.0, rows, device=device), seed_R2, torch.arange(rows, dtype=torch.int32, device=device))
    drawn = {}
    for most in range(1, blocks + 1):
        monkeypatch.setattr(ops_sampling, "_PROGRAMS", most * rows)
        best = ops_sampling.most_likely(logits_RV)
        _same(best, most_likely(logits_RV.cpu()))
        drawn[pieces_of(blocks, most)] = ops_sampling.draw(logits_RV, *best, *rest)
    assert set(drawn) == {1, 2, 3, 4, 7}
    assert all(torch.equal(token_R, drawn[1]) for token_R in drawn.values())


def test_half_precision_logits_are_read_as_float32(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """The most likely and the drawn tokens are those of the same numbers in float32."""
    seed_R2, position_R = torch.zeros(4, 2, dtype=torch.int32, device=device), torch.arange(4, dtype=torch.int32, device=device)
    rest = (torch.full((4,), 0.8, device=device), seed_R2, position_R)
    for dtype in dtypes:
        logits_RV = _logits(4, 5000, device).to(dtype)
        best = ops_sampling.most_likely(logits_RV)
        _same(best, most_likely(logits_RV.cpu()))
        assert torch.equal(ops_sampling.draw(logits_RV, *best, *rest), ops_sampling.draw(logits_RV.float(), *best, *rest))


def test_rows_of_temperature_0_keep_their_token(device: torch.device) -> None:
    """A draw leaves them alone, whatever token they have, and its neighbours are drawn as without them."""
    logits_RV, token_R = _logits(6, 3000, device), torch.arange(6, device=device)
    seed_R2 = torch.tensor([randomness.seed_words(seed) for seed in range(6)], dtype=torch.int32, device=device)
    position_R, temperature_R = torch.zeros(6, dtype=torch.int32, device=device), torch.ones(6, device=device)
    given = (logits_RV, logits_RV.amax(-1), token_R)
    drawn_R = ops_sampling.draw(*given, temperature_R, seed_R2, position_R)
    temperature_R[::2] = 0
    mixed_R = ops_sampling.draw(*given, temperature_R, seed_R2, position_R)
    assert mixed_R[::2].tolist() == [0, 2, 4]
    assert torch.equal(mixed_R[1::2], drawn_R[1::2])


@triton.jit  # type: ignore[untyped-decorator]
def _noise_kernel(seed_ptr, position_ptr, bits_ptr, noise_ptr, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a block of a row of bits and of noise."""
    row, token_B = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(seed_ptr + row * 2).to(tl.uint32, bitcast=True)
    high = tl.load(seed_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
    position = tl.load(position_ptr + row).to(tl.uint32, bitcast=True)
    bits_B = ops_sampling._bits(low, high, position, token_B)
    tl.store(bits_ptr + row * vocab + token_B, bits_B.to(tl.int32, bitcast=True))
    tl.store(noise_ptr + row * vocab + token_B, ops_sampling._gumbel(bits_B))


def _same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def _logits(rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)).to(device)
