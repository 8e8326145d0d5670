"""Rotary position embedding: from a RopeSpec to the table of cosines and sines that `rope_and_cache` reads.

L positions, D head size, J = D / 2 frequencies. All in float32, as published models were trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paddock.model_config import RopeSpec


def cos_sin_table(spec: RopeSpec, *, head_dim: int, max_model_len: int, device: torch.device) -> Tensor:
    """Return cos_sin [L, D] float32: for each position below `max_model_len`, D/2 cosines, then D/2 sines."""
    frequencies_J = inverse_frequencies(spec, head_dim=head_dim, max_model_len=max_model_len)
    angles_LJ = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies_J
    table_LD = torch.cat((angles_LJ.cos(), angles_LJ.sin()), dim=-1)
    return (table_LD * spec.attention_factor).to(device)


def inverse_frequencies(spec: RopeSpec, *, head_dim: int, max_model_len: int) -> Tensor:
    """Return the angle a position adds, for each of the D/2 frequencies, float32.

    The dynamic kind takes its base from `max_model_len`, whatever a sequence's length: see docs/decisions/0021.
    """
    if spec.kind == "dynamic":
        return _powers(_dynamic_theta(spec, head_dim, max_model_len), head_dim)
    plain_J = _powers(spec.theta, head_dim)
    if spec.kind == "linear":
        return plain_J / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, plain_J)
    if spec.kind == "yarn":
        return _yarn(spec, plain_J, head_dim)
    return plain_J


def _powers(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic_theta(spec: RopeSpec, head_dim: int, max_model_len: int) -> float:
    """Return the base stretched so that `max_model_len` positions turn as far as the original ones (NTK-aware scaling)."""
    length = max(max_model_len, spec.original_max_position)
    stretch = spec.factor * length / spec.original_max_position - (spec.factor - 1.0)
    return float(spec.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(spec: RopeSpec, plain_J: Tensor) -> Tensor:
    """Return frequencies divided by the factor where the wavelength exceeds the old context, kept where it is short."""
    turns_J = spec.original_max_position * plain_J / (2 * math.pi)  # over the original context
    smooth_J = ((turns_J - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0.0, 1.0)
    return (1.0 - smooth_J) * plain_J / spec.factor + smooth_J * plain_J


def _yarn(spec: RopeSpec, plain_J: Tensor, head_dim: int) -> Tensor:
    """Return frequencies interpolated below `beta_slow` turns over the original context, kept above `beta_fast`."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(spec.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp_J = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    interpolated_J = ramp_J.clamp(0.0, 1.0)
    return plain_J / spec.factor * interpolated_J + plain_J * (1.0 - interpolated_J)
