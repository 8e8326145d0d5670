from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paddock.axes import EMBED, FFN, PLAIN, VOCAB, Linear, Part
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer
from paddock_quant_awq import method
from paddock_quant_awq.detect import AwqGemm
from paddock_quant_awq.method import linear_method
from paddock_quant_awq.words import pack, unpack

GATE_UP = Linear("gate_up", (Part("gate", FFN, 8, source="gate"), Part("up", FFN, 24, source="up")), Part("embed", EMBED, 64))


def made(group: int, dtype: str = "float32") -> LinearLayer:
    """Return a layer with random words and scales that all differ."""
    scheme = AwqGemm(dtype=dtype, group_size=group)
    layer = LinearLayer(GATE_UP, linear_method(scheme, "gate", GATE_UP), getattr(torch, dtype), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    layer.randomise(generator)
    scales = layer.get_parameter("scales")
    scales.copy_(torch.rand(scales.shape, generator=generator) * 0.01 + 0.001)
    layer.finalise()
    return layer


def slow_weight(layer: LinearLayer, group: int) -> Tensor:
    """Return W [O, I] read bit by bit from the words, as AutoAWQ's gemm layout is described."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight, qzeros = layer.get_parameter("qweight").tolist(), layer.get_parameter("qzeros").tolist()
    scales = layer.get_parameter("scales").tolist()
    weight = torch.empty(32, 64)
    for o in range(32):
        nibble = 4 * order.index(o % 8)
        for i in range(64):
            g = 0 if group == -1 else i // group
            q, z = (qweight[i][o // 8] >> nibble) & 15, (qzeros[g][o // 8] >> nibble) & 15
            weight[o, i] = (q - z) * scales[g][o]
    return weight


def test_eight_numbers_in_order_are_one_known_word() -> None:
    """0..7 pack to 0x75316420, the word AutoAWQ makes of them."""
    assert pack(torch.arange(8)).tolist() == [0x75316420]
    assert unpack(torch.tensor([0x75316420], dtype=torch.int32)).tolist() == list(range(8))


def test_packing_and_unpacking_undo_each_other() -> None:
    """Every word, those with the highest bit included, holds eight numbers and they make the same word."""
    words = torch.empty(50, 3, dtype=torch.int32).random_(-(2**31), 2**31, generator=torch.Generator().manual_seed(0))
    assert bool((words < 0).any())
    numbers = unpack(words)
    assert numbers.shape == (50, 24)
    assert (numbers.min().item(), numbers.max().item()) == (0, 15)
    assert torch.equal(pack(numbers), words)


class HostValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors made of values on the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


def test_a_product_takes_no_values_from_the_host() -> None:
    """A copy from the host would break off the capture of a decode step as a CUDA graph."""
    layer, x = made(32), torch.ones(2, 64)
    with HostValues() as seen:  # type: ignore[no-untyped-call]
        torch.tensor([1, 2])
        assert seen.count == 1
        layer(x)
    assert seen.count == 1


@pytest.mark.parametrize("group", [16, 32, 64, -1])
def test_dequantising_follows_the_layout(group: int) -> None:
    """(weight - zero point) * scale, number by number, for several group sizes."""
    layer = made(group)
    torch.testing.assert_close(layer.method.dequantise(layer), slow_weight(layer, group), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_apply_multiplies_what_dequantise_says(tokens: int) -> None:
    """The product equals a plain product with the dequantised weight."""
    layer = made(32)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(6))
    expected = x.double() @ layer.method.dequantise(layer).double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_columns_are_multiplied_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many columns are unpacked at a time, down to one word."""
    layer = made(32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    whole = layer(x)
    monkeypatch.setattr(method, "_CHUNK_BYTES", 1)
    assert [columns.stop - columns.start for columns, _ in method._columns(layer)] == [8, 8, 8, 8]
    torch.testing.assert_close(layer(x), whole)


def test_storage_stays_near_four_bits_a_weight() -> None:
    """A group of 128 costs 4 bits a weight, and 20 more bits a group."""
    wide = Linear("wide", (Part("wide", FFN, 256, source="wide"),), Part("embed", EMBED, 512))
    layer = LinearLayer(
        wide, linear_method(AwqGemm(dtype="bfloat16", group_size=128), "wide", wide), torch.bfloat16, torch.device("cpu")
    )
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    bits = 8 * sum(parameter.nbytes for parameter in layer.parameters())
    assert bits / (256 * 512) == 4 + 20 / 128


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_has_the_planned_dtype_and_is_rounded_once(dtype: str) -> None:
    """Half-precision results are the float32 results, rounded."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6)).to(getattr(torch, dtype))
    assert torch.equal(made(32, dtype)(x), made(32)(x.float()).to(getattr(torch, dtype)))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number_is_refused(bad: float) -> None:
    """A corrupt scale is an error naming the linear."""
    layer = made(32)
    layer.get_parameter("scales")[1, 3] = bad
    with pytest.raises(CheckpointError, match="scales of gate"):
        layer.finalise()


def test_random_parameters_keep_the_magnitude() -> None:
    """Dummy words use all sixteen numbers and multiply unit inputs into outputs of about one."""
    wide = Linear("wide", (Part("wide", FFN, 64, source="wide"),), Part("embed", EMBED, 512))
    layer = LinearLayer(
        wide, linear_method(AwqGemm(dtype="float32", group_size=64), "wide", wide), torch.float32, torch.device("cpu")
    )
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    assert set(unpack(layer.get_parameter("qweight")).flatten().tolist()) == set(range(16))
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(2))
    assert 0.7 < layer(x).std().item() < 1.3


def test_a_skipped_linear_is_plain() -> None:
    """What the checkpoint leaves alone is stored in the planned dtype."""
    head = Linear("lm_head", (Part("tokens", VOCAB, 11, source="lm_head"),), Part("embed", EMBED, 64))
    plain = linear_method(AwqGemm(dtype="bfloat16", group_size=32), "lm_head", head)
    assert plain.input_format == PLAIN
    assert plain.create(head, torch.device("cpu"))["weight"].dtype == torch.bfloat16
