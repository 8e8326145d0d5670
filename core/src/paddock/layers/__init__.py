"""What models are made of, and what plugins may build on: the names below are public, the modules they come from are not.

Public too: `paddock.layers.reference`, the plain-torch definition of every op, and `paddock.layers.int4`, the layout of 4-bit
weights.
"""

from paddock.layers.attention import AttentionBackend, AttentionInputs, AttentionParams, LayerKV, Model
from paddock.layers.builder import Builder
from paddock.layers.linear import FusesSiluMul, LinearLayer, LinearMethod, QuantisesRows, TakesFewPlain, TakesGroups
from paddock.layers.op_marks import HEADS_APART, TWO_DELTAS, takes
from paddock.layers.ops import OP_NAMES, Ops
from paddock.layers.parallel import Communicator
from paddock.layers.parameters import allocate, finalise, part_spans, randomise, targets, torch_dtype
from paddock.layers.quantized import Activation, QuantizedActivation
from paddock.layers.unquantized import PlainMethod

__all__ = [
    "HEADS_APART",
    "OP_NAMES",
    "TWO_DELTAS",
    "Activation",
    "AttentionBackend",
    "AttentionInputs",
    "AttentionParams",
    "Builder",
    "Communicator",
    "FusesSiluMul",
    "LayerKV",
    "LinearLayer",
    "LinearMethod",
    "Model",
    "Ops",
    "PlainMethod",
    "QuantisesRows",
    "QuantizedActivation",
    "TakesFewPlain",
    "TakesGroups",
    "allocate",
    "finalise",
    "part_spans",
    "randomise",
    "takes",
    "targets",
    "torch_dtype",
]
