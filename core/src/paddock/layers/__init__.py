"""What models are made of."""

from paddock.layers.attention import AttentionBackend, AttentionInputs, AttentionParams, LayerKV, Model
from paddock.layers.builder import Builder
from paddock.layers.linear import Activation, LinearLayer, LinearMethod, QuantizedActivation
from paddock.layers.ops import Ops
from paddock.layers.parallel import Communicator
from paddock.layers.parameters import allocate, finalise, part_spans, randomise, targets

__all__ = [
    "Activation",
    "AttentionBackend",
    "AttentionInputs",
    "AttentionParams",
    "Builder",
    "Communicator",
    "LayerKV",
    "LinearLayer",
    "LinearMethod",
    "Model",
    "Ops",
    "QuantizedActivation",
    "allocate",
    "finalise",
    "part_spans",
    "randomise",
    "targets",
]
