"""Linears with scales of blocks of 128 by 128, their inputs scaled per token and 128."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paddock import axes
from paddock.axes import EMBED, FFN, FP8_GROUP, PLAIN, Linear, Part
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, Ops, QuantizedActivation, TakesGroups, finalise, reference
from paddock_quant_fp8.blocks import BlockMethod, multiplies
from paddock_quant_fp8.dequantising import DequantisedMethod, see_groups
from paddock_quant_fp8.schemes import BLOCK, ROW, Stored

STORED = Stored(scales=BLOCK, input_format=PLAIN, group=128, scale_name="weight_scale_inv")


def linear(*parts: int, inputs: int = 300) -> Linear:
    """Return a fused linear of parts of these sizes."""
    out = tuple(Part(f"p{i}", FFN, size, source=f"p{i}") for i, size in enumerate(parts))
    return Linear("fused", out, Part("embed", EMBED, inputs))


def made(declared: Linear, method: BlockMethod | DequantisedMethod, ops: Ops | None = None) -> LinearLayer:
    """Return a layer with random weights, each scale another, not yet finalised."""
    layer = LinearLayer(declared, method, method.dtype, torch.device("cpu"), ops=ops)
    generator = torch.Generator().manual_seed(5)
    layer.randomise(generator)
    scale = layer.get_parameter(STORED.scale_name)
    scale.copy_(torch.rand(scale.shape, generator=generator) * 0.01 + 0.001)
    return layer


def inputs(tokens: int = 5, width: int = 300) -> Tensor:
    """Return activations of unit size, some tokens and some groups much larger than others."""
    x_TI = torch.randn(tokens, width, generator=torch.Generator().manual_seed(6)) * torch.logspace(-3, 2, tokens)[:, None]
    return x_TI * torch.logspace(-1, 1, width)


@pytest.mark.parametrize(
    ("parts", "outputs"), [((200,), 128), ((256, 128, 100), 128), ((192, 64, 64), 64), ((19, 9), 1), ((128, 72), 128)], ids=str
)
def test_the_product_is_that_of_what_the_weights_mean(parts: tuple[int, ...], outputs: int) -> None:
    """As the method of dequantised weights has it, which knows blocks by their parts: wherever parts begin."""
    declared = linear(*parts)
    method = BlockMethod(stored=STORED, dtype=torch.float32)
    layer, plain = made(declared, method), made(declared, DequantisedMethod(stored=STORED, dtype=torch.float32))
    layer.finalise()
    plain.finalise()
    assert method.outputs(declared) == outputs
    torch.testing.assert_close(method.dequantise(layer), plain.method.dequantise(plain), rtol=0, atol=0)
    x_TI = inputs()
    expected = see_groups(x_TI, 128).double() @ plain.method.dequantise(plain).double().T
    for given in (x_TI, reference.quantize_fp8_token(x_TI, None, 128)):
        found = layer(given).double()
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-6


def test_inputs_may_come_quantised_and_are_quantised_once_if_not() -> None:
    """By the op that was bound, with groups of 128; the product is the bound one's too."""
    asked: list[object] = []

    def quantise(x_TI: Tensor, bound: float | None = None, group: int | None = None, /) -> QuantizedActivation:
        asked.append((bound, group))
        return reference.quantize_fp8_token(x_TI, bound, group)

    def multiply(*given: object) -> Tensor:
        asked.append(given[4])
        return reference.linear_fp8_blocks(*given)  # type: ignore[arg-type]

    ops = Ops.bind({"quantize_fp8_token": quantise, "linear_fp8_blocks": multiply})
    layer = made(linear(192, 64), BlockMethod(stored=STORED, dtype=torch.bfloat16), ops)
    layer.finalise()
    x_TI = inputs().bfloat16()
    plain, quantised = layer(x_TI), layer(reference.quantize_fp8_token(x_TI, None, 128))
    assert torch.equal(plain, quantised)
    assert asked == [(None, 128), (64, 128), (64, 128)]


def test_inputs_are_announced_in_groups() -> None:
    """So that the producer before emits them."""
    method = BlockMethod(stored=STORED, dtype=torch.float32)
    assert isinstance(method, TakesGroups)
    assert (method.input_format, method.input_group, method.input_bound) == (FP8_GROUP, 128, None)


def test_ranks_hold_the_blocks_of_their_share() -> None:
    """A cut of the outputs at whole blocks, and of the inputs, gives what the whole gives."""
    declared = Linear("up", (Part("up", FFN, 512, source="up"),), Part("embed", EMBED, 256))
    method = BlockMethod(stored=STORED, dtype=torch.float32)
    whole = made(declared, method)
    shares = []
    for rank in range(2):
        share = LinearLayer(declared, method, torch.float32, torch.device("cpu"), shard=axes.Shard(rank, 2, frozenset({FFN})))
        rows = slice(256 * rank, 256 * (rank + 1))
        share.get_parameter("weight").copy_(whole.get_parameter("weight")[rows])
        share.get_parameter("weight_scale_inv").copy_(whole.get_parameter("weight_scale_inv")[2 * rank : 2 * rank + 2])
        shares.append(share)
    finalise(nn.ModuleList([whole, *shares]))
    x_TI = inputs(width=256)
    torch.testing.assert_close(torch.cat([share(x_TI) for share in shares], dim=1), whole(x_TI))


def test_odd_blocks_and_groups_are_left_to_plain_torch() -> None:
    """So are plain inputs, and scales a row."""
    assert multiplies(STORED)
    for other in (
        Stored(scales=BLOCK, input_format=PLAIN, block=(128, 64), group=64),
        Stored(scales=BLOCK, input_format=PLAIN, group=64),
        Stored(scales=BLOCK, input_format=PLAIN),
        Stored(scales=ROW, input_format=PLAIN, group=128),
    ):
        assert not multiplies(other)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), 2e4])
def test_a_block_with_an_unusable_scale_is_refused(bad: float) -> None:
    """The error names the tensor of the part the block belongs to, and the value."""
    layer = made(linear(192, 64), BlockMethod(stored=STORED, dtype=torch.float32))
    layer.get_parameter("weight_scale_inv")[2, 1] = bad
    with pytest.raises(CheckpointError, match=f"weight_scale_inv of p1 holds {bad}"):
        layer.finalise()
