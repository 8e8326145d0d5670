"""The noise: its definition, its purity, and how random it looks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paddock.execution import randomness

CPU = torch.device("cpu")


def bits(seeds: Any, positions: Any, vocab_size: Any) -> Any:
    """Return noise bits as uint32, one row for each (seed, position)."""
    words = torch.tensor([randomness.seed_words(seed) for seed in seeds], dtype=torch.int32)
    index = torch.tensor(list(positions), dtype=torch.int32)
    return randomness.noise_bits(words, index, randomness.token_terms(vocab_size, CPU)).numpy().view(np.uint32)


def chi_square_z(observed: Any, expected: Any) -> Any:
    """Return the chi-square statistic of equal expectations in standard deviations from its mean."""
    observed = np.asarray(observed, dtype=np.float64)
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = observed.size - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_bits_follow_the_documented_definition() -> None:
    """The tensors give what the definition in the docstring gives, worked out in plain integers."""

    def wrap(x: Any) -> Any:
        return x & 0xFFFFFFFF

    def mix(x: Any) -> Any:
        x = wrap((x ^ x >> 16) * 0x7FEB352D)
        x = wrap((x ^ x >> 15) * 0x846CA68B)
        return x ^ x >> 16

    def one(seed: int, position: int, token: int) -> Any:
        low, high = (wrap(word) for word in randomness.seed_words(seed))
        a = mix(wrap(low + position * 0x9E3779B9))
        b = mix(high ^ a)
        x = wrap(token * 0x9E3779B1 + a)
        x = wrap((x ^ x >> 16) * 0x7FEB352D) ^ b
        x = wrap((x ^ x >> 15) * 0x846CA68B)
        return x ^ x >> 16

    seeds, positions = [0, 1, 2**63 + 11, 12345], [0, 1, 131071, 7]
    found = bits(seeds, positions, 300)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert found[row].tolist() == [one(seed, position, token) for token in range(300)]


def test_noise_of_a_row_ignores_the_other_rows() -> None:
    """A row's noise is the same alone and among others, in any order."""
    together = bits([5, 6, 7], [1, 9, 4], 100)
    assert (together[1] == bits([6], [9], 100)[0]).all()
    assert (together[::-1] == bits([7, 6, 5], [4, 9, 1], 100)).all()


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_bits_are_uniform(along: Any) -> None:
    """High and low bytes are uniform along tokens, along positions and along seeds (chi-square, fixed inputs)."""
    draws = {
        "tokens": bits([1, 2], [0, 3], 1 << 17),
        "positions": bits([3] * 4096, range(4096), 64),
        "seeds": bits(range(4096), [0] * 4096, 64),
    }[along].reshape(-1)
    for shift in (0, 8, 16, 24):
        counts = np.bincount((draws >> shift) & 0xFF, minlength=256)
        assert abs(chi_square_z(counts, draws.size / 256)) < 4


@pytest.mark.parametrize("pair", ["token", "position", "seed", "far seed"])
def test_neighbours_are_independent(pair: Any) -> None:
    """The joint distribution of a draw and its neighbour is uniform (chi-square on 64 x 64 cells, fixed inputs)."""
    size = 2048
    base = bits([9] * size, range(size), 128)
    other = {
        "token": np.roll(base, 1, axis=1),
        "position": bits([9] * size, range(1, size + 1), 128),
        "seed": bits([10] * size, range(size), 128),
        "far seed": bits([9 + 2**32] * size, range(size), 128),
    }[pair]
    for shift in (26, 3):
        cells = ((base >> shift) & 63) * 64 + ((other >> shift) & 63)
        assert abs(chi_square_z(np.bincount(cells.reshape(-1), minlength=4096), base.size / 4096)) < 4


def test_no_two_keys_share_their_noise_in_another_order() -> None:
    """Rows of different seeds and positions hold hardly any value in common, as random 32-bit words do not."""
    rows = bits([1, 1, 2, 2], [0, 1, 0, 1], 1 << 14)
    for i in range(4):
        for j in range(i):
            assert len(np.intersect1d(rows[i], rows[j])) <= 2


def test_flipping_one_token_bit_flips_half_the_bits() -> None:
    """Tokens that differ in one bit have noise that differs in 16 of 32 bits on average."""
    draws = bits(range(64), range(64), 1 << 12)
    for bit in range(12):
        flipped = draws ^ draws[:, np.arange(1 << 12) ^ (1 << bit)]
        share = np.unpackbits(flipped.view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.005


def test_gumbel_noise_is_finite_and_has_its_moments() -> None:
    """Mean and variance are Euler's constant and pi^2 / 6, and the extreme bit patterns stay finite."""
    noise = randomness.gumbel(torch.from_numpy(bits(range(64), range(64), 1 << 14).view(np.int32)))
    assert abs(float(noise.mean()) - 0.57722) < 0.005
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.02
    extremes = randomness.gumbel(torch.tensor([[0, 1, -1, -2, 2**31 - 1, -(2**31)]], dtype=torch.int32))
    assert extremes.isfinite().all()


def test_noise_keeps_detail_where_winners_lie() -> None:
    """Among the largest of many draws hardly any two are equal: the race is not decided by rounding."""
    noise = randomness.gumbel(torch.from_numpy(bits([4], [2], 1 << 17).view(np.int32)))[0]
    largest = noise.topk(1000).values
    assert len(set(largest.tolist())) > 995


def test_drawn_seeds_differ_by_count_and_by_engine_seed() -> None:
    """Unseeded sequences never share a seed, within an engine or between engines of near seeds."""
    seeds = {randomness.drawn_seed(engine, count) for engine in range(20) for count in range(500)}
    assert len(seeds) == 20 * 500
