"""Paddock's command line with FP8 weights that are drawn as vLLM draws them: python -m tests.bench.peer_weights bench ...

A GPU's clock in large products is what its power allows, and power is what bits that change take: 8,192 tokens times 57344 x 8192
ran at 1,223 TFLOP/s on an H200 with normal weights, at 1,372 with these, at 1,417 with zeros (fast sums 1,304, 1,461, 1,578).
vLLM's load format `dummy` draws weights uniformly between -1e-3 and 1e-3 and then stores them in FP8 (its function
`initialize_dummy_weights`), whose values nearest zero are 0 and 2^-9: 98 of 100 are zeros. Paddock's `dummy` draws what a trained
weight looks like. A figure taken with this beside vLLM's is of like weights; what a trained model gives is the one without.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from paddock import layers
from paddock.cli.main import main
from paddock.layers.reference import FP8

BOUND = 1e-3  # of vLLM's weights
_AT_ONCE = 1 << 28  # elements drawn at once in float32


@torch.no_grad()
def flatten(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every FP8 parameter with values between -1e-3 and 1e-3, rounded to FP8."""
    for parameter in model.parameters():
        if parameter.dtype == FP8:
            for part in torch.split(parameter.view(-1), _AT_ONCE):
                drawn = torch.empty(len(part), device=part.device)
                part.copy_(drawn.uniform_(-BOUND, BOUND, generator=generator))


def draw_as_vllm_does() -> None:
    """Have load format `dummy` draw FP8 weights so."""
    own = layers.randomise

    def randomise(model: nn.Module, generator: torch.Generator) -> None:
        own(model, generator)
        flatten(model, generator)

    layers.randomise = randomise


if __name__ == "__main__":
    draw_as_vllm_does()
    sys.exit(main())
