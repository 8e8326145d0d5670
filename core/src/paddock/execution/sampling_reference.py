"""Every sampling op in plain torch: the definition, the CPU path and the oracle of every kernel of the same name.

R rows, V vocabulary, B blocks of a row, X a block's tokens. Logits are float32; `most_likely` and `draw` also take float16 and
bfloat16 and read them as float32. Of the other arguments `token_R` is int64, `top_k_R`, `seed_R2` and `position_R` are int32, the
rest float32. `seed_R2` may be a transposed view.

An op works on all rows alike: on a GPU it neither waits for the device nor lets a value decide what is launched, so that a CUDA
graph can hold it. Rows do not see each other. A row whose largest logit is not finite may get any token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paddock.execution import randomness
from paddock.execution.filters import threshold

_DRAW_ELEMENTS = 1 << 24  # logits drawn from at a time: bounds each temporary to 64 MiB
_BLOCK = 256  # divides every published model's vocabulary


def most_likely(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit [R] (float32), NaN if it holds one, and the first token that has it [R] (int64).

    torch's argmax is not vectorised on a CPU: 16 x 49,152 take 0.65 ms on a core, by blocks 0.08 ms.
    """
    logits_RV = logits_RV.float()
    rows, vocab_size = logits_RV.shape
    if logits_RV.device.type != "cpu" or vocab_size % _BLOCK or not rows:
        top_R, token_R = logits_RV.max(dim=-1)
        return top_R, token_R
    blocks_RBX = logits_RV.unflatten(-1, (-1, _BLOCK))  # type: ignore[no-untyped-call]
    top_R, block_R = blocks_RBX.amax(dim=-1).max(dim=-1)
    within_R = blocks_RBX[torch.arange(rows), block_R].argmax(dim=-1)
    return top_R, block_R * _BLOCK + within_R


def draw(logits_RV: Tensor, top_R: Tensor, token_R: Tensor, temperature_R: Tensor, seed_R2: Tensor, position_R: Tensor) -> Tensor:
    """Return a token [R] of each row's softmax at its temperature, by Gumbel's trick with the noise of `execution.randomness`.

    `top_R` and `token_R` are what `most_likely` gives; a row of temperature 0 keeps its `token_R`.
    """
    winners = []
    for span in _spans(logits_RV):
        scaled_RV = _scaled(logits_RV[span], top_R[span], temperature_R[span])
        winners.append(_race(scaled_RV, seed_R2[span], position_R[span]))
    return torch.where(temperature_R > 0, torch.cat((token_R[:0], *winners)), token_R)


def draw_filtered(
    logits_RV: Tensor,
    top_R: Tensor,
    token_R: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R2: Tensor,
    position_R: Tensor,
) -> Tensor:
    """Return a `draw` from what min-p, top-k and top-p leave of each row, as `execution.filters` defines it.

    `top_k_R` is 0 to V. 0, 1 and 0 turn `top_k_R`, `top_p_R` and `min_p_R` off.
    """
    winners = []
    for span in _spans(logits_RV):
        scaled_RV = _scaled(logits_RV[span], top_R[span], temperature_R[span])
        least_R1 = threshold(scaled_RV, top_k_R[span], top_p_R[span], min_p_R[span])
        scaled_RV.masked_fill_(scaled_RV < least_R1, -torch.inf)
        winners.append(_race(scaled_RV, seed_R2[span], position_R[span]))
    return torch.where(temperature_R > 0, torch.cat((token_R[:0], *winners)), token_R)


def _spans(logits_RV: Tensor) -> Iterator[slice]:
    """Yield the rows some at a time."""
    rows, vocab_size = logits_RV.shape
    height = max(1, _DRAW_ELEMENTS // vocab_size)
    return (slice(first, first + height) for first in range(0, rows, height))


def _scaled(logits_RV: Tensor, top_R: Tensor, temperature_R: Tensor) -> Tensor:
    """Return the logits over the temperature, each row's largest at 0; where it is 0 the logits as they are."""
    divisor_R = torch.where(temperature_R > 0, temperature_R, 1.0)
    return (logits_RV - top_R[:, None]).div_(divisor_R[:, None])  # float32, as top_R is


def _race(scaled_RV: Tensor, seed_R2: Tensor, position_R: Tensor) -> Tensor:
    """Return the token [R] whose scaled logit and noise sum highest: a sample of the softmax."""
    terms_V = randomness.token_terms(scaled_RV.shape[-1], scaled_RV.device)
    noise_RV = randomness.gumbel(randomness.noise_bits(seed_R2, position_R, terms_V))
    return most_likely(noise_RV.add_(scaled_RV))[1]
