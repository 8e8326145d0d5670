"""Fused, packed, grouped and scalar tensors: where each checkpoint tensor goes, and what each rank takes of it."""

from __future__ import annotations

import pytest
import torch

from paddock import axes
from paddock.errors import PlanError
from paddock.layers.parameters import allocate, linear_targets

OUT, IN = axes.TensorAxis("out"), axes.TensorAxis("in")
CUTS = frozenset({axes.HEADS, axes.KV_HEADS, axes.FFN})
QKV = axes.Linear(
    "qkv",
    (
        axes.Part("q", axes.HEADS, 4, 16, "q_proj"),
        axes.Part("k", axes.KV_HEADS, 2, 16, "k_proj"),
        axes.Part("v", axes.KV_HEADS, 2, 16, "v_proj"),
    ),
    axes.Part("embed", axes.EMBED, 64),
    bias=True,
)
DOWN = axes.Linear("down", (axes.Part("o", axes.EMBED, 64, source="down"),), axes.Part("ffn", axes.FFN, 256))
AWQ = (
    axes.Tensor("qweight", "int32", (IN, axes.TensorAxis("out", pack=8))),
    axes.Tensor("scales", "float16", (axes.TensorAxis("in", group=32), OUT)),
)
FP8 = (axes.Tensor("weight", "float8_e4m3fn", (OUT, IN)), axes.Tensor("weight_scale", "float32"))


def fill(linear: axes.Linear, tensors: tuple[axes.Tensor, ...], shard: axes.Shard = axes.WHOLE) -> dict[str, torch.Tensor]:
    """Return a share's parameters after loading checkpoint tensors whose elements count up from 0, part after part."""
    share = shard.linear(linear)
    parameters = {**allocate(share, tensors, torch.device("cpu")), "bias": torch.empty(share.out_size)}
    for value in parameters.values():
        value.zero_()
    for number, target in enumerate(linear_targets(linear, shard, "layer.", tensors, parameters)):
        stored = 100_000 * number + torch.arange(torch.Size(target.shape).numel()).view(target.shape)
        target.view.copy_(stored[tuple(slice(*span) for span in target.region)])
    return parameters


def test_parts_follow_one_another_along_out() -> None:
    """q, k and v of 64, 32 and 32 rows lie in one weight, and each scalar scale in its place."""
    parameters = allocate(QKV, FP8, torch.device("cpu"))
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == {"weight": (128, 64), "weight_scale": (3,)}
    targets = {t.name: t for t in linear_targets(QKV, axes.WHOLE, "x.", FP8, {**parameters, "bias": torch.empty(128)})}
    assert targets["x.k_proj.weight"].view.data_ptr() == parameters["weight"][64:].data_ptr()
    assert targets["x.v_proj.weight_scale"].view.data_ptr() == parameters["weight_scale"][2:].data_ptr()
    assert targets["x.v_proj.weight_scale"].shape == ()
    assert targets["x.v_proj.bias"].shape == (32,)


def test_packed_and_grouped_tensors_keep_their_own_extents() -> None:
    """Eight outputs a word, one scale for 32 inputs: extents are counted in words and groups."""
    shapes = {name: tuple(tensor.shape) for name, tensor in allocate(QKV, AWQ, torch.device("cpu")).items()}
    assert shapes == {"qweight": (64, 16), "scales": (2, 128)}


@pytest.mark.parametrize("tensors", [AWQ, (axes.Tensor("weight", "float32", (OUT, IN)),)], ids=["awq", "plain"])
def test_two_ranks_together_hold_what_one_holds(tensors: tuple[axes.Tensor, ...]) -> None:
    """Each rank's rows of every part are those of the whole, in order, nothing lost and nothing twice."""
    whole = fill(QKV, tensors)
    ranks = [fill(QKV, tensors, axes.Shard(rank, 2, CUTS)) for rank in range(2)]
    for tensor in tensors:
        axis = next(i for i, a in enumerate(tensor.axes) if a.side == "out")
        sizes = [n // tensor.axes[axis].pack for n in (32, 16, 16)]
        pieces = [torch.split_with_sizes(rank[tensor.name], sizes, dim=axis) for rank in ranks]
        joined = torch.cat([pieces[rank][part] for part in range(3) for rank in range(2)], dim=axis)
        assert torch.equal(joined, whole[tensor.name])


def test_fewer_kv_heads_than_ranks_are_replicated() -> None:
    """With 2 KV heads, ranks 0 and 1 of 4 hold the first, ranks 2 and 3 the second."""
    weight = (axes.Tensor("weight", "float32", (OUT, IN)),)
    held = [fill(QKV, weight, axes.Shard(rank, 4, CUTS))["weight"][16:32] for rank in range(4)]
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[2], held[3])
    assert not torch.equal(held[1], held[2])


def test_an_input_cut_takes_the_columns_and_the_groups() -> None:
    """A rank of a cut input axis takes its columns of the weight and its groups of the scales."""
    whole, half = fill(DOWN, AWQ), fill(DOWN, AWQ, axes.Shard(1, 2, CUTS))
    assert torch.equal(half["qweight"], whole["qweight"][128:])
    assert torch.equal(half["scales"], whole["scales"][4:])


def test_a_group_that_straddles_a_cut_is_refused() -> None:
    """Groups of 48 inputs do not fall on a cut at 128."""
    straddling = (axes.Tensor("scales", "float16", (axes.TensorAxis("in", group=48), OUT)),)
    with pytest.raises(PlanError, match="do not fall on the groups of 48"):
        fill(DOWN, straddling, axes.Shard(1, 2, CUTS))


def test_one_entry_for_a_whole_axis_goes_to_every_rank() -> None:
    """A group of -1 is one entry, whatever the cut."""
    row = (axes.Tensor("scales", "float32", (OUT, axes.TensorAxis("in", group=-1))),)
    assert torch.equal(fill(DOWN, row, axes.Shard(1, 2, CUTS))["scales"], fill(DOWN, row)["scales"])


SLICED = (
    axes.Tensor("weight", "float32", (OUT, IN)),
    axes.Tensor("scales", "float32", (axes.TensorAxis("in", group=64, cut=32), OUT)),
)


def test_a_rank_takes_every_group_that_it_touches_where_the_format_slices_them() -> None:
    """Four ranks of 96 inputs in groups of 64: a rank that begins inside a group has it too, and so has the one before."""
    wide = axes.Linear("down", (axes.Part("o", axes.EMBED, 8, source="down"),), axes.Part("ffn", axes.FFN, 384))
    whole = fill(wide, SLICED)["scales"]
    assert whole.shape == (6, 8)
    held = [fill(wide, SLICED, axes.Shard(rank, 4, CUTS))["scales"] for rank in range(4)]
    assert all(
        torch.equal(rows, whole[first:end]) for rows, (first, end) in zip(held, [(0, 2), (1, 3), (3, 5), (4, 6)], strict=True)
    )
    assert SLICED[1].held([8], 96) == 3 * 8
    with pytest.raises(PlanError, match="do not fall on the groups of 32"):
        fill(wide, SLICED, axes.Shard(1, 8, CUTS))


def test_a_tensor_without_outputs_is_kept_for_each_part() -> None:
    """The order of the inputs is a vector of each of q, k and v; a shape is two numbers of each; a rank takes its inputs."""
    per_part = (
        axes.Tensor("g_idx", "int32", (IN,)),
        axes.Tensor("weight_shape", "int64", (axes.TensorAxis("fixed", entries=2),)),
    )
    held = fill(QKV, per_part)
    assert (held["g_idx"].shape, held["weight_shape"].shape) == ((3, 64), (3, 2))
    assert held["g_idx"][1, 5] == 100_005
    half = fill(DOWN, per_part, axes.Shard(1, 2, CUTS))
    assert half["g_idx"].shape == (1, 128)
    assert half["g_idx"][0, 0] == 128
    assert half["weight_shape"].tolist() == [[100_000, 100_001]]


def test_a_tensor_may_be_stored_under_a_name_of_its_own() -> None:
    """Some savers keep what belongs to a linear in another module."""
    elsewhere = (axes.Tensor("act_scales", "float32", (IN,), optional=True, stored_as="h.0.mlp.act.scales"),)
    (target,) = linear_targets(DOWN, axes.WHOLE, "h.0.mlp.", elsewhere, allocate(DOWN, elsewhere, torch.device("cpu")))
    assert (target.name, target.shape, target.optional) == ("h.0.mlp.act.scales", (256,), True)
