"""A made-up model family, formats and strategies, as small as planning's rules allow, and how to plan with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from paddock.axes import EMBED, FFN, HEADS, KV_HEADS, VOCAB, Embedding, Linear, Part, Tensor, TensorAxis, Vector, WeightTable
from paddock.checkpoint.source import ModelSource
from paddock.config import EngineConfig
from paddock.model_config import ConfigReader
from paddock.planning.hardware import GIB, Hardware
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.plugins import (
    AttentionNeeds,
    AttentionSpec,
    CheckpointFacts,
    Issue,
    ModelSpec,
    ObserverSpec,
    OpSpec,
    ParallelSpec,
    QuantizationSpec,
    hookimpl,
)
from paddock.plugins.host import PluginHost
from paddock.plugins.registry import Registry

CONFIGS = Path(__file__).parent / "configs"
HERE = __name__

RAW = {"architectures": ["MadeForCausalLM"], "dtype": "bfloat16"}
# Sizes of the made-up model: 4 layers, 64 wide, 4 heads of 16 with 2 KV heads, 128 in the MLP, 96 tokens, 256 positions.
LAYERS, WIDTH, NUM_HEADS, NUM_KV, HEAD, MLP, VOCABULARY, POSITIONS = 4, 64, 4, 2, 16, 128, 96, 256


@frozen(kw_only=True)
class Made:
    """The made-up model's config."""

    num_layers: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    tied: bool
    features: frozenset[str]


def parse_config(raw: Mapping[str, Any], ignored: Iterable[str] = ()) -> Made:
    """Return the config."""
    return Made(
        num_layers=raw.get("layers", LAYERS),
        vocab_size=VOCABULARY,
        max_model_len=raw.get("positions", POSITIONS),
        eos_token_ids=(7,),
        dtype=raw["dtype"],
        tied=raw.get("tied", False),
        features=frozenset(raw.get("features", ())),
    )


def weights(config: Made) -> WeightTable:
    """Return its parameters."""
    embed, ffn = Part("embed", EMBED, WIDTH), Part("ffn", FFN, MLP)
    q = Part("q", HEADS, NUM_HEADS, HEAD, "q")
    k, v = (Part(name, KV_HEADS, NUM_KV, HEAD, name) for name in "kv")
    head = Part("head", VOCAB, VOCABULARY, source="head")
    return WeightTable(
        outer=(
            Embedding("embed", Part("tokens", VOCAB, VOCABULARY, source="tokens"), embed),
            Vector("norm", embed, bias=True, source="norm"),
            Linear("head", (head,), embed, tied_to="embed" if config.tied else ""),
        ),
        layer=(
            Vector("norm", embed, bias=True, source="norm"),
            Linear("qkv", (q, k, v), embed, bias=True),
            Linear("o", (Part("o", EMBED, WIDTH, source="o"),), Part("heads", HEADS, NUM_HEADS, HEAD)),
            Linear("up", (Part("up", FFN, MLP, source="up"),), embed),
            Linear("down", (Part("down", EMBED, WIDTH, source="down"),), ffn),
        ),
        num_layers=config.num_layers,
        layer_source="layers.{i}.",
    )


def attention(config: Made) -> AttentionNeeds:
    """Return what it asks of attention."""
    return AttentionNeeds(num_heads=NUM_HEADS, num_kv_heads=NUM_KV, head_dim=HEAD, features=config.features)


@frozen(kw_only=True)
class Grouped:
    """INT4 in groups of 32 inputs, 8 outputs to a word; heads stay plain."""

    dtype: str
    name: str = "grouped"
    kv_cache_dtype: str | None = "fp8"

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return words and scales, or the plain weight."""
        if linear.out[0].axis == VOCAB:
            return (Tensor("weight", self.dtype, (TensorAxis("out"), TensorAxis("in"))),)
        words, groups = TensorAxis("out", pack=8), TensorAxis("in", group=32)
        return (Tensor("words", "int32", (TensorAxis("in"), words)), Tensor("scales", "float16", (groups, TensorAxis("out"))))


def detect_grouped(facts: CheckpointFacts) -> Grouped | None:
    """Return the scheme of a checkpoint that says `grouped`."""
    entry = facts.config.get("quantization_config") or {}
    if entry.get("quant_method") != "grouped":
        return None
    reader = ConfigReader(facts.config, ignored=facts.ignored_keys).section("quantization_config")
    assert reader is not None
    reader.accept("quant_method")
    reader.finish()
    return Grouped(dtype=facts.dtype)


def workspace(needs: AttentionNeeds, tokens: int, sequences: int) -> int:
    """Return a thousand bytes a sequence."""
    return 1000 * sequences


class MadePlugin:
    """Brings the made-up family, a format, a GPU backend and both parallel strategies."""

    @hookimpl
    def paddock_models(self) -> list[ModelSpec]:
        """Return the family."""
        return [
            ModelSpec(
                name="made",
                architectures=("MadeForCausalLM",),
                parse_config=f"{HERE}:parse_config",
                weights=f"{HERE}:weights",
                attention=f"{HERE}:attention",
                build=f"{HERE}:build",
            )
        ]

    @hookimpl
    def paddock_quantizations(self) -> list[QuantizationSpec]:
        """Return the format."""
        return [
            QuantizationSpec(
                name="grouped", detect=f"{HERE}:detect_grouped", method=f"{HERE}:method", dtypes=("float16", "bfloat16")
            )
        ]

    @hookimpl
    def paddock_attention_backends(self) -> list[AttentionSpec]:
        """Return a backend for new GPUs, which outranks the plain one."""
        return [
            AttentionSpec(
                name="quick",
                factory=f"{HERE}:factory",
                devices=("cuda",),
                dtypes=("bfloat16", "float16"),
                kv_cache_dtypes=("bfloat16", "float16"),
                page_sizes=(64, 32),
                head_dims=(16, 128),
                min_compute_capability=(9, 0),
                graph_capturable=True,
                workspace=f"{HERE}:workspace",
                rank=10,
            )
        ]

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return a quick op for GPUs."""
        return [OpSpec(op="rms_norm", implementation=f"{HERE}:rms_norm", devices=("cuda",), rank=5)]

    @hookimpl
    def paddock_observers(self) -> list[ObserverSpec]:
        """Return an observer."""
        return [ObserverSpec(name="watch", factory=f"{HERE}:watch")]


class ParallelPlugin:
    """Brings tensor and pipeline parallelism."""

    @hookimpl
    def paddock_parallel_strategies(self) -> list[ParallelSpec]:
        """Return both strategies."""
        cuts = frozenset({HEADS, KV_HEADS, FFN, VOCAB})
        both: dict[str, Any] = {"communicator": f"{HERE}:communicator", "runner": f"{HERE}:runner"}
        return [
            ParallelSpec(name="tensor", axis="tp", cuts=cuts, nesting=1, max_size=4, **both),
            ParallelSpec(name="pipeline", axis="pp", cuts=frozenset(), nesting=0, **both),
        ]


class ComplainingPlugin:
    """Finds something wrong with every plan."""

    @hookimpl
    def paddock_check_plan(self, plan: Plan) -> list[Issue]:
        """Return a warning that quotes the plan."""
        return [Issue(level="warning", code="made_up", message=f"{plan.num_layers} layers", fix="none")]


def registry(*plugins: object) -> Registry:
    """Return what the core, the made-up plugin and `plugins` bring, nothing that is installed."""
    return PluginHost(plugins=(MadePlugin(), *plugins), autoload=False).collect()


def gpus(count: int = 1, *, gib: float = 80, capability: tuple[int, int] = (9, 0)) -> Hardware:
    """Return GPUs of a size."""
    size = int(gib * GIB)
    return Hardware(
        device="cuda", name="Made GPU", count=count, memory_bytes=size, available_bytes=size, compute_capability=capability
    )


def cpu(*, gib: float = 16, bf16: bool = False) -> Hardware:
    """Return a CPU with that much memory, all of it free."""
    size = int(gib * GIB)
    return Hardware(device="cpu", name="Made CPU", memory_bytes=size, available_bytes=size, bf16_instructions=bf16)


def source(raw: Mapping[str, Any], **others: Any) -> ModelSource:
    """Return a model folder's files that say `raw`."""
    return ModelSource(name="made", folder=Path("made"), config=raw, **others)


def planned(
    raw: Mapping[str, Any] = RAW, hardware: Hardware | None = None, *, plugins: Iterable[object] = (), **options: Any
) -> Plan:
    """Return the plan of the made-up model, changed by `raw`, on one GPU unless told otherwise."""
    config = EngineConfig(model="made", **options)
    return resolve(config, registry(*plugins), hardware or gpus(), source({**RAW, **raw}))


def published(name: str) -> dict[str, Any]:
    """Return a published config.json."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config
