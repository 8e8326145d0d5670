"""Tensor parallelism: ranks together compute what one does, groups that straddle a border included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.quant_awq.tests.made import CPU, linear, made, named, scheme_of, weight
from plugins.quant_awq.tests.written import FORMATS
from torch import Tensor

from paddock import axes
from paddock.axes import EMBED, FFN, KV_HEADS, Linear, Part, Shard
from paddock.errors import CheckpointError, PlanError
from paddock.layers import LinearLayer
from paddock.testing.oracle import bound, relative_rms
from paddock.testing.ranks import ThreadCommunicator, run_ranks
from paddock_quant_awq.method import Int4Method, local_groups

CUTS = frozenset({FFN, KV_HEADS})
SLICEABLE = [name for name in FORMATS if name != "gptq-ordered"]


def attended(groups: int, width: int, outs: int) -> Linear:
    """Return a linear like Falcon's `dense`: its inputs are whole KV groups of heads."""
    return Linear("dense", (Part("dense", EMBED, outs, source="down"),), Part("attended", KV_HEADS, groups, width))


def summed(name: str, whole: Linear, world: int, group: int, x_TI: Tensor) -> tuple[list[Tensor], list[LinearLayer], Tensor]:
    """Return what every rank gets after the sum, the ranks' layers, and the weight all of them stand for."""
    stored, meaning_OI = FORMATS[name].store(weight(whole.out_size, whole.in_size), group)
    scheme = scheme_of(FORMATS[name].entry(group))
    layers = [made(scheme, whole, named(stored), Shard(rank, world, CUTS)) for rank in range(world)]

    def work(rank: int, communicator: ThreadCommunicator) -> Tensor:
        start, stop = layers[rank].shard.span(whole.inp)
        layers[rank].reduce = communicator.all_reduce
        y_TO: Tensor = layers[rank](x_TI[:, start:stop])
        return y_TO

    return run_ranks(world, work), layers, meaning_OI


@pytest.mark.parametrize("name", [name for name in SLICEABLE if not FORMATS[name].fp8])
def test_eight_ranks_of_14_and_a_half_groups_sum_to_the_whole(name: str) -> None:
    """Falcon-180B's `dense` at eight-way tensor parallel in miniature: 29 heads of 64 a rank, groups of 128 over all of them."""
    whole = attended(8, 29 * 64, 24)
    x_TI = torch.randn(3, whole.in_size, generator=torch.Generator().manual_seed(4))
    outputs, layers, meaning_OI = summed(name, whole, 8, 128, x_TI)
    expected_TO = x_TI.double() @ meaning_OI.double().T
    for output_TO in outputs:
        assert relative_rms(output_TO, expected_TO) <= bound("linear", torch.float32)
    for rank, layer in enumerate(layers):
        assert isinstance(layer.method, Int4Method)
        assert layer.method.form is not None
        assert (layer.method.form.group, layer.method.form.groups) == (64, 29)
        assert torch.equal(layer.method.dequantise(layer), meaning_OI[:, rank * 1856 : (rank + 1) * 1856])


@pytest.mark.parametrize("name", SLICEABLE)
@pytest.mark.parametrize(("group", "world"), [(64, 2), (64, 4), (-1, 4)])
def test_a_rank_holds_its_columns_whether_or_not_groups_straddle(name: str, group: int, world: int) -> None:
    """Ranks of 96 or 48 inputs in groups of 64, and one group for all: 48 is no multiple of 32, and 96 is 1.5 groups."""
    whole = attended(4, 96 if world == 4 else 48, 16)
    stored, meaning_OI = FORMATS[name].store(weight(16, whole.in_size), group)
    scheme = scheme_of(FORMATS[name].entry(group))
    for rank in range(world):
        layer = made(scheme, whole, named(stored), Shard(rank, world, CUTS))
        start, stop = layer.shard.span(whole.inp)
        assert torch.equal(layer.method.dequantise(layer), meaning_OI[:, start:stop])


@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_holds_its_rows(name: str) -> None:
    """Outputs are cut part by part; formats that pack along them are cut at whole words."""
    whole = Linear("qkv", (Part("q", KV_HEADS, 2, 16, "p0"), Part("k", KV_HEADS, 2, 8, "p1")), Part("embed", EMBED, 64))
    parts = [FORMATS[name].store(weight(size, 64, size), 16) for size in (32, 16)]
    stored = {key: value for i, (part, _) in enumerate(parts) for key, value in named(part, f"p{i}").items()}
    scheme = scheme_of(FORMATS[name].entry(16))
    for rank in range(2):
        layer = made(scheme, whole, stored, Shard(rank, 2, CUTS))
        q_OI, k_OI = (meaning for _, meaning in parts)
        expected = torch.cat((q_OI[16 * rank : 16 * (rank + 1)], k_OI[8 * rank : 8 * (rank + 1)]))
        assert torch.equal(layer.method.dequantise(layer), expected)


@settings(deadline=None, max_examples=200)
@given(group=st.sampled_from([32, 64, 128, 256]), pieces=st.integers(1, 40), world=st.integers(1, 8), rank=st.integers(0, 7))
def test_every_input_of_a_share_gets_its_own_group(group: int, pieces: int, world: int, rank: int) -> None:
    """For every share that begins at a multiple of 32: local groups divide it and point at the groups that its inputs are of."""
    size, rank = 32 * pieces, rank % world
    start = rank * size
    local, rows_G = local_groups(group, start, size, CPU)
    assert size % local == 0
    assert local % 32 == 0
    first = start // group
    expected = [(start + i) // group - first for i in range(size)]
    assert rows_G.repeat_interleave(local).tolist() == expected
    axis = axes.TensorAxis("in", group=group, cut=32)
    assert axis.extent(size, start) == expected[-1] + 1
    assert axis.held(size) == len(rows_G)


@pytest.mark.parametrize(("name", "group", "world"), [("gptq-ordered", 64, 2), ("awq", 48, 16)])
def test_a_rank_that_would_break_a_group_is_refused(name: str, group: int, world: int) -> None:
    """Groups with an order of their own are on one rank; groups that are no multiple of 32 are whole."""
    whole = linear(16, 384)
    stored, _ = FORMATS[name].store(weight(16, 384), group)
    with pytest.raises(PlanError, match="do not fall on the groups"):
        made(scheme_of(FORMATS[name].entry(group)), whole, named(stored), Shard(1, world, CUTS))


@pytest.mark.parametrize("name", ["awq", "packed", "modelopt"])
def test_a_rank_keeps_its_own_weights_in_fp8(name: str) -> None:
    """Of a share that begins inside a group as of any: what it keeps gives the bits of what it makes."""
    whole = attended(8, 29 * 64, 24)
    stored, _ = FORMATS[name].store(weight(whole.out_size, whole.in_size), 128)
    x_TI = torch.randn(3, 29 * 64, generator=torch.Generator().manual_seed(5))
    for rank in (0, 3):
        makes, keeps = (
            made(scheme_of(FORMATS[name].entry(128)).with_fp8_from(1, 2, keep=keep), whole, named(stored), Shard(rank, 8, CUTS))
            for keep in (False, True)
        )
        assert keeps.get_parameter("fp8_weight").shape == (24, 29 * 64)
        assert torch.equal(keeps(x_TI), makes(x_TI))


def test_an_order_that_nobody_announced_is_refused_on_several_ranks() -> None:
    """Only the tensors say that inputs are reordered: planning could not know, so loading says what to do."""
    stored, _ = FORMATS["gptq-ordered"].store(weight(16, 384), 64)
    with pytest.raises(CheckpointError, match="reorders the inputs") as error:
        made(scheme_of(FORMATS["gptq"].entry(64)), linear(16, 384), named(stored), Shard(1, 2, CUTS))
    assert "tensor_parallel_size 1" in error.value.fix
