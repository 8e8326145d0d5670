from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paddock.axes import EMBED, FFN, FP8_TOKEN, PLAIN, Linear, Part
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, reference
from paddock_quant_fp8 import scales
from paddock_quant_fp8.dequantising import DequantisedMethod, see_groups
from paddock_quant_fp8.schemes import BLOCK, ROW, TENSOR, Stored

# 19 and 9 outputs, 21 inputs: no block of 8 by 6 is whole at an edge.
GATE_UP = Linear("gate_up", (Part("gate", FFN, 19, source="gate"), Part("up", FFN, 9, source="up")), Part("embed", EMBED, 21))
BLOCKS = Stored(scales=BLOCK, input_format=PLAIN, block=(8, 6), group=6, scale_name="weight_scale_inv")
ALL = {
    "block": BLOCKS,
    "block, plain inputs": Stored(scales=BLOCK, input_format=PLAIN, block=(8, 6)),
    "block, inputs per token": Stored(scales=BLOCK, input_format=FP8_TOKEN, block=(8, 6)),
    "row, plain inputs": Stored(scales=ROW, input_format=PLAIN),
    "tensor, plain inputs": Stored(scales=TENSOR, input_format=PLAIN),
    "row, inputs per group": Stored(scales=ROW, input_format=PLAIN, group=6),
}


def made(stored: Stored, dtype: torch.dtype = torch.float32) -> LinearLayer:
    """Return a layer with random weights and scales, not yet finalised."""
    layer = LinearLayer(GATE_UP, DequantisedMethod(stored=stored, dtype=dtype), dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    layer.randomise(generator)
    scale = layer.get_parameter(stored.scale_name)
    scale.copy_(torch.rand(scale.shape, generator=generator) * 0.01 + 0.001)
    return layer


def inputs(tokens: int = 5) -> Tensor:
    """Return activations of unit size, some tokens much larger than others."""
    return torch.randn(tokens, 21, generator=torch.Generator().manual_seed(6)) * torch.logspace(-3, 2, tokens)[:, None]


def test_blocks_start_anew_at_every_part() -> None:
    """The scale of a weight is that of its row among its own part's rows, three blocks of the first and two of the second."""
    layer = made(BLOCKS)
    scale_QJ = layer.get_parameter("weight_scale_inv").clone()
    assert scale_QJ.shape == (5, 4)
    weight_OI = layer.get_parameter("weight").float()
    expected = torch.empty(28, 21)
    for row in range(28):
        for column in range(21):
            block = row // 8 if row < 19 else 3 + (row - 19) // 8
            expected[row, column] = weight_OI[row, column] * scale_QJ[block, column // 6]
    layer.finalise()
    torch.testing.assert_close(layer.method.dequantise(layer), expected, rtol=0, atol=0)


def test_inputs_are_scaled_by_their_token_and_group() -> None:
    """Each run of six inputs has its largest magnitude at 448, the last run of three too."""
    x = inputs()
    for token in range(5):
        for start in range(0, 21, 6):
            part = x[token, start : start + 6]
            scale = max(part.abs().max().item() / 448, reference.FP8_MIN_SCALE)
            expected = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            torch.testing.assert_close(see_groups(x, 6)[token, start : start + 6], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_apply_multiplies_what_dequantise_says(name: str, tokens: int) -> None:
    """The product equals the input as the format sees it times the dequantised weight."""
    layer = made(ALL[name])
    layer.finalise()
    x = inputs(tokens)
    seen = see_groups(x, 6) if ALL[name].group else x
    if ALL[name].input_format == FP8_TOKEN:
        q = reference.quantize_fp8_token(x)
        seen = q.values_TI.float() * q.scale
        torch.testing.assert_close(layer(q), layer(x), rtol=0, atol=0)
    expected = seen.double() @ layer.method.dequantise(layer).double().T
    error = (layer(x).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_rows_do_not_touch_each_other(name: str) -> None:
    """A token's output is, but for the order of a sum, what it is alone, however large its neighbours are."""
    layer = made(ALL[name])
    layer.finalise()
    x = inputs()
    together = layer(x)
    for token in range(5):
        torch.testing.assert_close(layer(x[token : token + 1])[0], together[token], rtol=1e-5, atol=1e-6 * x[token].norm().item())


@pytest.mark.parametrize("name", ALL)
def test_the_output_has_the_planned_dtype_and_is_rounded_once(name: str) -> None:
    """Half-precision results are the float32 results, rounded."""
    half, exact = made(ALL[name], torch.bfloat16), made(ALL[name])
    half.finalise()
    exact.finalise()
    x = inputs().bfloat16()
    assert torch.equal(half(x), exact(x.float()).bfloat16())


def test_weights_are_held_in_float32_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many rows are dequantised at a time."""
    layer = made(ALL["row, plain inputs"])
    layer.finalise()
    whole = layer(inputs())
    monkeypatch.setattr(scales, "CHUNK_BYTES", 4 * 21 * 5)
    torch.testing.assert_close(layer(inputs()), whole)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 2e4])
def test_a_block_with_an_unusable_scale_is_refused(bad: float) -> None:
    """The error names the tensor of the part the block belongs to, and the value."""
    layer = made(BLOCKS)
    layer.get_parameter("weight_scale_inv")[4, 1] = bad
    with pytest.raises(CheckpointError, match=f"weight_scale_inv of up holds {bad}"):
        layer.finalise()


def test_random_parameters_keep_the_magnitude() -> None:
    """Dummy weights are finite and multiply unit inputs into outputs of about one."""
    wide = Linear("wide", (Part("wide", FFN, 64, source="wide"),), Part("embed", EMBED, 512))
    method = DequantisedMethod(stored=Stored(scales=BLOCK, input_format=PLAIN, group=128), dtype=torch.float32)
    layer = LinearLayer(wide, method, torch.float32, torch.device("cpu"))
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(2))
    assert 0.8 < layer(x).std().item() < 1.2
