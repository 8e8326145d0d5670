"""The builder makes what the table declares, on one rank, on several, and on the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from attrs import evolve
from torch import nn

from paddock import axes
from paddock.errors import PlanError
from paddock.layers import Builder, LinearLayer, LinearMethod, Ops, QuantizedActivation, finalise, randomise, targets
from paddock.layers.attention_layer import alibi_slopes
from paddock.layers.packing import pack
from paddock.layers.quantized import Activation
from paddock.layers.reference_attention import TorchAttention
from paddock.layers.unquantized import PlainMethod

EMBED = axes.Part("embed", axes.EMBED, 8)
VOCAB = axes.Part("tokens", axes.VOCAB, 12, source="embed")
TABLE = axes.WeightTable(
    outer=(
        axes.Embedding("embed", VOCAB, EMBED),
        axes.Vector("norm", EMBED, source="norm"),
        axes.Linear("head", (axes.Part("tokens", axes.VOCAB, 12, source="head"),), EMBED, fed_by="norm"),
        axes.Linear("tied", (axes.Part("tokens", axes.VOCAB, 12, source="tied"),), EMBED, tied_to="embed"),
    ),
    layer=(
        axes.Vector("norm", EMBED, source="ln"),
        axes.Linear("up", (axes.Part("up", axes.FFN, 6, source="up"),), EMBED, fed_by="norm"),
        axes.Linear("also", (axes.Part("also", axes.EMBED, 4, source="also"),), EMBED, fed_by="norm"),
        axes.Linear("down", (axes.Part("down", axes.EMBED, 8, source="down"),), axes.Part("kv", axes.KV_HEADS, 3, 2)),
    ),
    num_layers=4,
    layer_source="layers.{i}.",
)


class Fp8(PlainMethod):
    """Multiplies with a plain weight an input it wants in FP8."""

    def __init__(self, linear: axes.Linear, input_format: str, scale: float | None, bound: float | None) -> None:
        super().__init__(axes.Unquantized("float32").tensors("", linear))
        self.input_format, self.input_bound = input_format, bound
        self.scale = None if scale is None else torch.tensor(scale)
        self.seen: list[Activation] = []

    def input_scale(self, layer: LinearLayer) -> torch.Tensor | None:
        """Return the scale given."""
        return self.scale

    def apply(self, layer: LinearLayer, x_TI: Activation) -> torch.Tensor:
        """Note what came, and multiply with it."""
        self.seen.append(x_TI)
        return super().apply(layer, x_TI if isinstance(x_TI, torch.Tensor) else x_TI.values_TI.float() * x_TI.scale)


class Fp8FromFour(Fp8):
    """One that takes fewer than four tokens plain."""

    input_format_from = 4


class Fp8InGroups(Fp8):
    """One whose scales are of four inputs, or of so many as are given."""

    def __init__(self, linear: axes.Linear, input_group: int = 4) -> None:
        super().__init__(linear, axes.FP8_GROUP, None, None)
        self.input_group = input_group

    def apply(self, layer: LinearLayer, x_TI: Activation) -> torch.Tensor:
        """Note what came, and return nothing of worth."""
        self.seen.append(x_TI)
        return torch.zeros(1)


def plain(path: str, linear: axes.Linear) -> LinearMethod:
    """Return the plain float32 method."""
    return PlainMethod.of(linear, torch.float32)


def builder(
    shard: axes.Shard = axes.WHOLE,
    *,
    layers: range | None = None,
    method_for: Callable[[str, axes.Linear], LinearMethod] = plain,
) -> Builder:
    """Return a builder of TABLE's modules on the CPU."""
    return Builder(
        TABLE,
        method_for=method_for,
        ops=Ops(),
        backend=TorchAttention(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=16,
        shard=shard,
        layers=layers,
    )


def outer(make: Builder) -> nn.ModuleDict:
    """Return a model's outer modules."""
    head, norm = make.linear("head"), make.norm("norm", eps=1e-5)
    return nn.ModuleDict({"embed": make.embedding("embed"), "norm": norm, "head": head, "tied": make.linear("tied")})


def test_names_are_looked_up_in_their_scope() -> None:
    """`norm` is the final norm outside the layers and the layer's own inside one."""
    assert [t.name for t in targets(builder().norm("norm", eps=1.0))] == ["norm.weight"]
    assert [t.name for t in targets(builder().layer(2).norm("norm", eps=1.0))] == ["layers.2.ln.weight"]


def test_a_method_is_asked_for_by_checkpoint_path() -> None:
    """`method_for` hears the checkpoint prefix of the linear's first part, and the whole declaration."""
    asked: list[tuple[str, int]] = []

    def method_for(path: str, linear: axes.Linear) -> LinearMethod:
        asked.append((path, linear.out_size))
        return plain(path, linear)

    builder(axes.Shard(0, 2, frozenset({axes.FFN})), method_for=method_for).layer(1).linear("up")
    assert asked == [("layers.1.up", 6)]


def test_a_tied_head_multiplies_with_the_embedding_and_loads_nothing() -> None:
    """One parameter serves both, under the embedding's name."""
    modules = outer(builder())
    randomise(modules, torch.Generator().manual_seed(0))
    finalise(modules)
    assert [t.name for t in targets(modules)] == ["embed.weight", "norm.weight", "head.weight"]
    x = torch.randn(3, 8)
    assert torch.allclose(modules["tied"](x), x @ modules["embed"].get_parameter("weight").T)


def test_a_shared_table_may_be_stored_under_the_heads_name() -> None:
    """The embedding is filled from its own name or, where a saver kept the other one, from that of the head tied to it."""
    found = {target.name: target.aliases for target in targets(outer(builder()))}
    assert found["embed.weight"] == ("tied.weight",)
    assert found["head.weight"] == ()


def test_stages_hold_the_ends_they_need() -> None:
    """The first stage loads the embedding, the last the norm and head, with a copy of the table for a tied one."""
    first, middle, last = (outer(builder(layers=r)) for r in (range(2), range(2, 3), range(3, 4)))
    assert [t.name for t in targets(first)] == ["embed.weight"]
    assert targets(middle) == []
    assert [t.name for t in targets(last)] == ["norm.weight", "head.weight", "embed.weight"]


def test_sums_over_a_replicated_input_are_refused() -> None:
    """Three KV heads cannot be summed over by two ranks, nor by six that hold each head twice."""
    for world in (2, 6):
        with pytest.raises(PlanError, match="kv"):
            builder(axes.Shard(0, world, frozenset({axes.KV_HEADS}))).layer(0).linear("down")


@pytest.mark.parametrize(
    ("up", "also", "expected"),
    [
        ((axes.FP8_TOKEN, None, 3.0), (axes.FP8_TOKEN, None, 3.0), QuantizedActivation),
        ((axes.FP8_STATIC, 0.5, None), (axes.FP8_STATIC, 0.5, None), QuantizedActivation),
        ((axes.FP8_STATIC, 0.5, None), (axes.FP8_STATIC, 0.25, None), torch.Tensor),
        ((axes.FP8_TOKEN, None, 3.0), (axes.FP8_TOKEN, None, None), torch.Tensor),
        ((axes.FP8_TOKEN, None, None), (axes.PLAIN, None, None), torch.Tensor),
    ],
    ids=["token", "static", "scales_differ", "bounds_differ", "formats_differ"],
)
def test_a_norm_emits_what_all_its_linears_take(
    up: tuple[str, float | None, float | None], also: tuple[str, float | None, float | None], expected: type
) -> None:
    """A format is emitted once where the linears agree on it, scale and bound included; else they are given a plain one."""
    wanted = {"layers.0.up": up, "layers.0.also": also}
    make = builder(method_for=lambda path, linear: Fp8(linear, *wanted[path])).layer(0)
    taker = make.linear("up")
    modules = nn.ModuleDict({"norm": make.norm("norm", eps=1e-5), "up": taker, "also": make.linear("also")})
    randomise(modules, torch.Generator().manual_seed(0))
    finalise(modules)
    _, h = modules["norm"](torch.randn(3, 8), torch.randn(3, 8))
    taker(h)
    assert isinstance(taker.method, Fp8)
    assert isinstance(taker.method.seen[0], expected)


def norm_feeding(up: Callable[[axes.Linear], LinearMethod], also: Callable[[axes.Linear], LinearMethod]) -> nn.Module:
    """Return a norm, ready to run, that feeds two linears by methods so made."""
    made = {"layers.0.up": up, "layers.0.also": also}
    make = builder(method_for=lambda path, linear: made[path](linear)).layer(0)
    modules = nn.ModuleDict({name: make.linear(name) for name in ("up", "also")})
    modules["norm"] = make.norm("norm", eps=1e-5)
    randomise(modules, torch.Generator().manual_seed(0))
    finalise(modules)
    return modules["norm"]


def taking_tokens(kind: type[Fp8]) -> Callable[[axes.Linear], LinearMethod]:
    """Return what makes a method of inputs with a scale a token."""
    return lambda linear: kind(linear, axes.FP8_TOKEN, None, None)


def test_a_norm_emits_scales_of_the_groups_its_linears_take() -> None:
    """Where they agree on how wide groups are, with a residual or without; else they are given a plain tensor."""
    for also, kind in ((4, QuantizedActivation), (2, torch.Tensor)):
        norm = norm_feeding(partial(Fp8InGroups, input_group=4), partial(Fp8InGroups, input_group=also))
        for delta in (None, torch.ones(3, 8)):
            _, h = norm(torch.randn(3, 8), delta)
            assert isinstance(h, kind)
            assert isinstance(h, torch.Tensor) or h.scale.shape == (3, 2)


def test_a_norm_emits_for_so_many_tokens_what_its_linears_take() -> None:
    """Fewer than the linear's border stay plain; one that takes FP8 of any number does not agree with it."""
    for also, kinds in ((Fp8FromFour, [torch.Tensor, QuantizedActivation]), (Fp8, [torch.Tensor, torch.Tensor])):
        norm = norm_feeding(taking_tokens(Fp8FromFour), taking_tokens(also))
        for delta in (None, torch.zeros(4, 8)):
            few, many = (norm(torch.randn(tokens, 8), None if delta is None else delta[:tokens])[1] for tokens in (3, 4))
            assert [type(few), type(many)] == kinds


def test_packing_changes_no_product_and_gives_the_weight_back() -> None:
    """A packed weight multiplies as the plain one, for no rows and many, and dequantises to the same bits."""
    linear = axes.Linear("big", (axes.Part("o", axes.EMBED, 300, source="o"),), axes.Part("i", axes.EMBED, 260))
    layer = LinearLayer(linear, PlainMethod.of(linear, torch.float32), torch.float32, torch.device("cpu"))
    randomise(layer, torch.Generator().manual_seed(0))
    weight = layer.get_parameter("weight").clone()
    finalise(layer)
    if pack(weight) is not None:
        assert layer.weight is None
    for rows in (0, 1, 7, 123):
        x = torch.randn(rows, 260)
        assert torch.allclose(layer(x), x @ weight.T, atol=1e-4)
    assert torch.equal(layer.method.dequantise(layer), weight)


@pytest.mark.parametrize(("heads", "expected"), [(4, [0.25, 0.0625, 0.015625, 0.00390625]), (3, [0.0625, 0.00390625, 0.25])])
def test_alibi_slopes_are_the_papers(heads: int, expected: list[float]) -> None:
    """A power of two of heads gets a geometric series; the rest, odd powers of its root."""
    assert alibi_slopes(heads).tolist() == pytest.approx(expected)


def test_without_outer_a_stage_holds_its_layers_alone() -> None:
    """Neither the embedding of the first nor the head of the last, so that a layer can be looked at by itself."""
    for stage in (range(1), range(4), range(3, 4)):
        make = evolve(builder(layers=stage), outer=False)
        outer = nn.ModuleList([make.embedding("embed"), make.norm("norm", eps=1e-5), make.linear("head"), make.linear("tied")])
        assert not list(outer.parameters())
        assert not targets(outer)
        assert list(make.layer(stage.start).linear("up").parameters())
