"""AWQ linears in plain torch: the CPU path, and the definition of every AWQ kernel.

Weights stay packed; a few output columns at a time are unpacked, so memory stays near four bits a weight.
T tokens, I inputs, O outputs, G groups of S inputs, W = O / 8 words, C columns of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from paddock import axes
from paddock.errors import CheckpointError
from paddock.layers import Activation, LinearLayer, LinearMethod, PlainMethod, allocate, torch_dtype
from paddock_quant_awq.detect import WORD, AwqGemm
from paddock_quant_awq.words import unpack

_CHUNK_BYTES = 64 << 20  # of weights held in float32 at a time
_RANDOM_DEVIATION = 6.5  # of the difference of two uniform numbers 0..15


def linear_method(scheme: AwqGemm, path: str, linear: axes.Linear) -> LinearMethod:
    """Return how `linear`, whose first part is at checkpoint prefix `path`, is stored and multiplied."""
    tensors = scheme.tensors(path, linear)
    if tensors[0].name == "weight":
        return PlainMethod(tensors)
    return AwqMethod(path=path, tensors=tensors, dtype=torch_dtype(scheme.dtype))


@frozen(kw_only=True)
class AwqMethod:
    """`qweight` [I, W] and `qzeros` [G, W] int32, `scales` [G, O] float16: W[i, o] = (q - z) * s. Returns `dtype`."""

    path: str
    tensors: tuple[axes.Tensor, ...]
    dtype: torch.dtype
    input_format: str = axes.PLAIN
    input_bound: float | None = None

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised parameters by tensor name."""
        return allocate(linear, self.tensors, device)

    def finalise(self, layer: LinearLayer) -> None:
        """Check the scales; the words stay as they are stored."""
        scales_GO = layer.get_parameter("scales")
        if not bool(((scales_GO > 0) & scales_GO.isfinite()).all()):
            raise CheckpointError(
                f"scales of {self.path} hold a number that is not positive", fix="make or download the checkpoint again"
            )

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return None: the input is plain."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O], multiplied and summed in float32 and rounded once."""
        assert isinstance(x_TI, Tensor), "an AWQ linear takes plain activations"
        x32_TI, y_TO = x_TI.float(), x_TI.new_empty((len(x_TI), layer.linear.out_size), dtype=self.dtype)
        for columns, weight_IC in _columns(layer):
            y_TO[:, columns] = (x32_TI @ weight_IC).to(self.dtype)
        return y_TO

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32."""
        return torch.cat([weight_IC.T for _, weight_IC in _columns(layer)])

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the words with random bits, and the scales so that outputs keep their inputs' magnitude."""
        for name in ("qweight", "qzeros"):
            layer.get_parameter(name).random_(-(2**31), 2**31, generator=generator)
        layer.get_parameter("scales").fill_(layer.whole.in_size**-0.5 / _RANDOM_DEVIATION)


def _columns(layer: LinearLayer) -> Iterator[tuple[slice, Tensor]]:
    """Yield columns of the output and their weights [I, C] in float32, a bounded piece at a time."""
    qweight_IW, qzeros_GW, scales_GO = (layer.get_parameter(name) for name in ("qweight", "qzeros", "scales"))
    inputs, words = qweight_IW.shape
    step = max(1, _CHUNK_BYTES // (4 * WORD * inputs))
    for start in range(0, words, step):
        stop = min(start + step, words)
        columns = slice(start * WORD, stop * WORD)
        zeros_G1C, scales_G1C = unpack(qzeros_GW[:, start:stop]).unsqueeze(1), scales_GO[:, columns].float().unsqueeze(1)
        numbers_GSC = unpack(qweight_IW[:, start:stop]).view(len(qzeros_GW), -1, (stop - start) * WORD)
        yield columns, ((numbers_GSC - zeros_G1C) * scales_G1C).flatten(0, 1)
