"""The roof: how fast a model could answer at best, from its sizes and from what its device can do. Free of torch.

P matmul parameters (the layers' linears, and the head once a sampled token), W the bytes of them, B requests at once, KV bytes a
token; F, FA and BW the operations a second of the device in matmuls and in attention, and its bytes a second:

    seconds a request = 2 P ISL / F + prefill attention / FA + OSL max(2 P / F, W / (B BW)) + OSL (ISL + OSL / 2) KV / BW
"""

from __future__ import annotations

from attrs import evolve, frozen

from paddock.axes import Linear
from paddock.planning import rebuild
from paddock.planning.hardware import bandwidth_of
from paddock.planning.plan import Plan
from paddock.planning.weights import stored_tensors

FORMULA = (
    "seconds a request = 2 P ISL / F + prefill attention / FA + OSL max(2 P / F, W / (B BW)) + OSL (ISL + OSL / 2) KV / BW; "
    "prefill attention = 2 heads x head size x ISL^2 a layer; P is the layers' linears, and the head once a sampled token; "
    "W their bytes, B requests at once, KV bytes a token; F that of FP8 for weights of eight bits or fewer; GPUs share the "
    "work evenly and talk for free, but a pipeline's stages work at the same time on different requests only"
)
MEASURABLE_SHARE = 0.9  # of the published bandwidth; an H200 copies at 4.3 of its 4.8 TB/s, an H100 at 3.0 of 3.35
BF16, FP8, NO_TENSOR_CORES = "bf16", "fp8", "float32"
# What weights of eight bits or fewer are stored in. An INT4 value is exact in FP8, so the roof of such a model is that of FP8
# products, whether its kernels make them or not.
_NARROW = frozenset({"float8_e4m3fn", "int32", "int8", "uint8"})


@frozen(kw_only=True)
class Ceilings:
    """What one device can do at best, each a second: bytes moved, operations in matmuls by input type, in bf16 attention.

    None where nobody measured it; `source` says where the others are from.
    """

    name: str
    bytes_per_second: float
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    attention_flops: float | None = None
    source: str

    def matmul_flops(self, kind: str) -> float | None:
        """Return the ceiling of matmuls with inputs of that kind."""
        return {BF16: self.bf16_flops, FP8: self.fp8_flops}.get(kind)


_H200_CHIP = "bf16 and FP8 GEMMs and causal attention (torch, cuDNN) of random data as measured on an H200"
_H200 = Ceilings(
    name="NVIDIA H200",
    bytes_per_second=4.3e12,
    bf16_flops=690e12,
    fp8_flops=1300e12,
    attention_flops=570e12,
    source=f"bytes: device-to-device copy, measured; operations: {_H200_CHIP}",
)
_H100 = evolve(_H200, name="NVIDIA H100 80GB HBM3", bytes_per_second=3.0e12, source=f"{_H200.source}, whose chip is the same")
MEASURED = {each.name: each for each in (_H200, _H100)}  # by the name torch gives the device


def ceilings_of(device_name: str) -> Ceilings | None:
    """Return the ceilings of the GPU torch calls so: measured, else of bandwidth alone; None for a CPU or a GPU nobody knows."""
    published = bandwidth_of(device_name)
    if device_name in MEASURED or published is None:
        return MEASURED.get(device_name)
    return Ceilings(
        name=device_name,
        bytes_per_second=MEASURABLE_SHARE * published,
        source=f"{MEASURABLE_SHARE:.0%} of the published bandwidth; compute was not measured and bounds nothing here",
    )


@frozen(kw_only=True)
class Demand:
    """What a model asks of its devices: parameters of matmuls by kind of input, bytes read a step, attention, KV, devices."""

    layer_parameters: dict[str, int]
    head_parameters: dict[str, int]
    weight_bytes: int
    attention_width: int  # query heads x head size, over all layers
    kv_bytes_per_token: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


@frozen(kw_only=True)
class Roof:
    """The least seconds a request of `isl` tokens in and `osl` out takes of the devices, term by term."""

    isl: int
    osl: int
    at_once: int
    prefill_matmul: float
    prefill_attention: float
    decode_matmul: float
    decode_kv: float

    @property
    def seconds(self) -> float:
        """Return the sum of the terms."""
        return self.prefill_matmul + self.prefill_attention + self.decode_matmul + self.decode_kv

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens out a second."""
        return self.osl / self.seconds


def demand_of(plan: Plan) -> Demand:
    """Return what the planned model asks, over all devices."""
    table = rebuild.weight_table(plan)
    tensors = stored_tensors(table, rebuild.scheme(plan))
    layers: dict[str, int] = {}
    head: dict[str, int] = {}
    outer = {id(module) for module in table.outer}
    for _, source, module in table.modules():
        if isinstance(module, Linear):
            counts = head if id(module) in outer else layers
            stored = {tensor.dtype for tensor in tensors.get(source + module.out[0].source, ())}
            kind = _kind(stored, plan.dtype)
            counts[kind] = counts.get(kind, 0) + module.out_size * module.in_size
    needs = rebuild.attention_needs(plan)
    return Demand(
        layer_parameters=layers,
        head_parameters=head,
        weight_bytes=plan.tensor_parallel_size * sum(ledger.weights.layers for ledger in plan.ledgers) + _head_bytes(plan),
        attention_width=plan.num_layers * needs.num_heads * needs.head_dim,
        kv_bytes_per_token=plan.kv_bytes_per_token,
        tensor_parallel=plan.tensor_parallel_size,
        pipeline_parallel=plan.pipeline_parallel_size,
    )


def roof(demand: Demand, ceilings: Ceilings, *, isl: int, osl: int, at_once: int) -> Roof:
    """Return the roof of requests of that size with `at_once` of them running; a ceiling that is None bounds nothing."""
    devices = demand.tensor_parallel * min(demand.pipeline_parallel, at_once)
    per_byte = 1 / (ceilings.bytes_per_second * devices)
    layers, head = (_matmul_seconds(counts, ceilings) / devices for counts in (demand.layer_parameters, demand.head_parameters))
    prefill_flops = 2.0 * demand.attention_width * isl**2
    return Roof(
        isl=isl,
        osl=osl,
        at_once=at_once,
        prefill_matmul=isl * layers,
        prefill_attention=_seconds(prefill_flops, ceilings.attention_flops) / devices,
        decode_matmul=osl * max(layers + head, demand.weight_bytes * per_byte / at_once),
        decode_kv=osl * (isl + osl / 2) * demand.kv_bytes_per_token * per_byte,
    )


def _kind(stored: set[str], dtype: str) -> str:
    """Return the quickest matmul a linear's weight allows: FP8 where it is narrow, else what the model computes in."""
    if stored & _NARROW:
        return FP8
    return BF16 if dtype in ("bfloat16", "float16") else NO_TENSOR_CORES


def _head_bytes(plan: Plan) -> int:
    """Return the bytes a step reads to make logits: the head's own or, where it is tied and no copy, those of the embedding."""
    weights = plan.ledgers[-1].weights
    return plan.tensor_parallel_size * (weights.head or weights.embeddings)


def _matmul_seconds(parameters: dict[str, int], ceilings: Ceilings) -> float:
    return sum(_seconds(2.0 * count, ceilings.matmul_flops(kind)) for kind, count in parameters.items())


def _seconds(flops: float, ceiling: float | None) -> float:
    return 0.0 if ceiling is None else flops / ceiling
