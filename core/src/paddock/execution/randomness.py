"""Noise that is a pure function of (seed, position in the output, token id): no state, no order, no neighbours.

R rows, V vocabulary. The definition, which every kernel must reproduce; all integers are 32 bits wide and wrap, shifts
are logical:

    mix(x):            x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    key(s, position):  a = mix(s.low + position * 0x9e3779b9);  b = mix(s.high ^ a)
    bits(a, b, token): x = token * 0x9e3779b1 + a;  x ^= x >> 16;  x *= 0x7feb352d;  x ^= b;
                       x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    uniform:           u = min(float32(bits >> 1) * 2^-31 + 2^-32, 1 - 2^-24)
    gumbel:            -log(-log1p(-u))

`s` is the seed's two words (`seed_words`). The multipliers are the published low-bias pair of C. Wellons' integer hash search;
the second key word enters half way so that no two keys give the same noise in another token order. u keeps
31 bits of detail near 0, where the winners of a race among 10^5 tokens lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9
_TOKEN = 0x9E3779B1
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_MASK64 = (1 << 64) - 1


def _signed(word: int) -> int:
    """Return the int32 of the same 32 bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def mix64(x: int) -> int:
    """Return a well-mixed 64-bit word, one for each `x` modulo 2^64 (the finaliser of splitmix64)."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def seed_words(seed: int) -> tuple[int, int]:
    """Return the low and high word of a mixed seed, as int32; near seeds give unrelated words."""
    word = mix64(seed + 0x9E3779B97F4A7C15)
    return _signed(word & 0xFFFFFFFF), _signed(word >> 32)


def drawn_seed(engine_seed: int, count: int) -> int:
    """Return the seed of the engine's `count`-th unseeded sequence."""
    return mix64(mix64(engine_seed) + count * 0x9E3779B97F4A7C15)


def token_terms(vocab_size: int, device: torch.device) -> Tensor:
    """Return token * 0x9e3779b1 for every token [V], int32."""
    return torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(_signed(_TOKEN))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * _FIRST
    x = (x ^ _shift(x, 15)) * _signed(_SECOND)
    return x ^ _shift(x, 16)


def noise_bits(seed_R2: Tensor, position_R: Tensor, terms_V: Tensor) -> Tensor:
    """Return 32 random bits [R, V] (as int32) for seed words and output positions, both int32."""
    a_R = _mix(seed_R2[:, 0] + position_R * _signed(_GOLDEN))
    b_R = _mix(seed_R2[:, 1] ^ a_R)
    x_RV = terms_V + a_R[:, None]
    x_RV.bitwise_xor_(_shift(x_RV, 16)).mul_(_FIRST).bitwise_xor_(b_R[:, None])
    x_RV.bitwise_xor_(_shift(x_RV, 15)).mul_(_signed(_SECOND))
    return x_RV.bitwise_xor_(_shift(x_RV, 16))


def gumbel(bits_RV: Tensor) -> Tensor:
    """Return standard Gumbel noise [R, V] in float32, finite everywhere."""
    u_RV = _shift(bits_RV, 1).to(torch.float32).mul_(2.0**-31).add_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return u_RV.neg_().log1p_().neg_().log_().neg_()
