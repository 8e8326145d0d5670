"""Random parameters of a trained model's magnitude, in each packing: what a checkpoint's tensors could hold."""

from __future__ import annotations

import torch
from torch import Tensor

from paddock import axes
from paddock.layers import LinearLayer
from paddock_quant_awq import scheme as schemes
from paddock_quant_awq.scheme import Int4Scheme

_SYMMETRIC_DEVIATION = 4.6  # of a uniform number -8..7
_ASYMMETRIC_DEVIATION = 6.5  # of the difference of two uniform numbers 0..15
_MIDDLES = {0: -0x77777778, 1: 0x77777777}  # eight zero points of 8 to a word, less the offset


def randomise(scheme: Int4Scheme, layer: LinearLayer, tensors: tuple[axes.Tensor, ...], generator: torch.Generator) -> None:
    """Fill a layer's stored parameters; GPTQ's zero points are all 8, for its words cannot hold every random one."""
    varied = not scheme.symmetric and scheme.packing != schemes.GPTQ
    deviation = _ASYMMETRIC_DEVIATION if varied else _SYMMETRIC_DEVIATION
    for tensor in tensors:
        parameter = layer.get_parameter(tensor.name)
        if tensor.name in ("scales", "weight_scale"):
            parameter.fill_(layer.whole.in_size**-0.5 / deviation)
        elif tensor.name in ("g_idx", "weight_g_idx"):
            _in_order(scheme, layer, parameter)
        elif tensor.name == "qzeros" and scheme.packing == schemes.GPTQ:
            parameter.fill_(_MIDDLES[scheme.zero_offset])
        elif tensor.name in ("weight_scale_2", "input_scale"):
            parameter.fill_(1.0)
        elif not tensor.optional:  # what may be absent is
            _random_bits(parameter, generator)


def _in_order(scheme: Int4Scheme, layer: LinearLayer, g_idx_PI: Tensor) -> None:
    size = layer.whole.in_size if scheme.group_size == -1 else scheme.group_size
    start = layer.linear.inp.start
    g_idx_PI.copy_(torch.arange(start, start + layer.linear.in_size, device=g_idx_PI.device) // size)


def _random_bits(parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.dtype == torch.int8:
        parameter.random_(-8, 8, generator=generator)
    elif parameter.dtype == torch.uint8:
        parameter.random_(0, 256, generator=generator)
    else:
        parameter.random_(-(2**31), 2**31, generator=generator)
