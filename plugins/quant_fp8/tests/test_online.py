from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from paddock.axes import EMBED, FFN, FP8_TOKEN, VOCAB, Linear, Part, Shard
from paddock.checkpoint.load import load
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, PlainMethod, targets
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.method import OnlineMethod, linear_method
from paddock_quant_fp8.online import scheme
from paddock_quant_fp8.rows import quantise_rows

safetensors = pytest.importorskip("safetensors.torch")
EMB = Part("embed", EMBED, 24)
GATE_UP = Linear("gate_up", (Part("gate", FFN, 6, source="gate"), Part("up", FFN, 10, source="up")), EMB, bias=True)
DOWN = Linear("down", (Part("down", EMBED, 24, source="down"),), Part("ffn", FFN, 16))
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 11, source="lm_head"),), EMB)
FP8 = scheme(CheckpointFacts(config={}, dtype="float32"))


def write(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write plain weights; return them."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"gate.weight": (6, 24), "up.weight": (10, 24), "gate.bias": (6,), "up.bias": (10,), "down.weight": (24, 16)}
    plain = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    plain["down.weight"][3] *= 100
    safetensors.save_file(plain, folder / "model.safetensors")
    return plain


def made(folder: Path, shard: Shard | None = None) -> dict[str, LinearLayer]:
    """Return both linears (or a rank's share), loaded and finalised."""
    layers = {linear.name: made_linear(linear, shard or Shard()) for linear in (GATE_UP, DOWN)}
    load(folder, targets(torch.nn.ModuleList(layers.values())))
    for layer in layers.values():
        layer.finalise()
    return layers


def made_linear(linear: Linear, shard: Shard) -> LinearLayer:
    """Return a linear that nothing is loaded into."""
    method = linear_method(FP8, linear.out[0].source, linear)
    return LinearLayer(linear, method, torch.float32, torch.device("cpu"), shard=shard)


def weight_of(layer: LinearLayer) -> Tensor:
    """Return the FP8 values, without their scales, in float32."""
    assert layer.get_parameter("weight").dtype == torch.float8_e4m3fn
    return layer.get_parameter("weight").float()


def expected(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and scales of rows by the letter of FBGEMM's rule."""
    scale_O1 = (weight_OI.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return (weight_OI.float() / scale_O1).clamp(-448, 448).to(torch.float8_e4m3fn), scale_O1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_weight_becomes_fp8_with_a_scale_a_row(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every row's largest magnitude is 448, biases stay as they are, fused parts follow one another."""
    plain = write(tmp_path, dtype)
    layers = made(tmp_path)
    for name, weight in (("gate_up", torch.cat((plain["gate.weight"], plain["up.weight"]))), ("down", plain["down.weight"])):
        values, scale = expected(weight)
        assert torch.equal(weight_of(layers[name]), values.float())
        torch.testing.assert_close(layers[name].get_parameter("weight_scale"), scale, rtol=0, atol=0)
        assert (weight_of(layers[name]).abs().amax(1) == 448).all()
    biases = torch.cat((plain["gate.bias"], plain["up.bias"])).float()
    torch.testing.assert_close(layers["gate_up"].get_parameter("bias"), biases)


def test_ranks_share_the_scales_of_whole_rows(tmp_path: Path) -> None:
    """A rank that holds half of a row's inputs has the scale of the row, so that shares put together are the whole."""
    write(tmp_path)
    whole = made(tmp_path)
    first, second = (made(tmp_path, Shard(rank, 2, frozenset({FFN}))) for rank in range(2))
    assert torch.equal(torch.cat((weight_of(first["down"]), weight_of(second["down"])), 1), weight_of(whole["down"]))
    assert torch.equal(first["down"].get_parameter("weight_scale"), whole["down"].get_parameter("weight_scale"))
    parts = [torch.split(weight_of(shared["gate_up"]), [3, 5]) for shared in (first, second)]
    together = torch.cat([parts[0][0], parts[1][0], parts[0][1], parts[1][1]])
    assert torch.equal(together, weight_of(whole["gate_up"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, bad: float) -> None:
    """A broken value gives its row a broken scale, which the check after loading names."""
    plain = write(tmp_path)
    plain["up.weight"][2, 5] = bad
    safetensors.save_file(plain, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weight_scale of up holds"):
        made(tmp_path)


def test_quantised_tensors_are_no_plain_weights(tmp_path: Path) -> None:
    """A checkpoint that holds FP8 weights is not plain: the error lists what is stored and what was expected."""
    plain = write(tmp_path)
    plain["down.weight"] = plain["down.weight"].to(torch.float8_e5m2)
    safetensors.save_file(plain, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'down.weight': is F8_E5M2, of shape \[24, 16\]; the model wants F32"):
        made(tmp_path)


def test_the_head_stays_plain_and_linears_take_fp8_per_token() -> None:
    """The method is that of row scales, beside a hook for loading."""
    assert isinstance(linear_method(FP8, "lm_head", HEAD), PlainMethod)
    method = linear_method(FP8, "down", DOWN)
    assert isinstance(method, OnlineMethod)
    assert (method.input_format, method.input_bound) == (FP8_TOKEN, None)
    assert [tensor.shape(24, 16) for tensor in method.tensors] == [(24, 16), (24, 1)]


def test_rows_are_quantised_to_the_byte() -> None:
    """A scale is the largest magnitude over 448, at least 1 / (448 * 512); values round to the nearest even, 448 is 0x7E."""
    rows = torch.tensor([[896.0, 1.0, -896.0, 34.0], [0.0, 0.0, 0.0, 0.0], [-448.0, 19.0, 17.0, 2.0**-9]])
    values, scales = quantise_rows(rows)
    torch.testing.assert_close(scales[:, 0], torch.tensor([2.0, 1 / (448 * 512), 1.0]), rtol=0, atol=0)
    # 34 / 2 = 17 lies between 16 (0x58) and 18 (0x59), 19 between 18 and 20 (0x5A): ties go to the even one.
    expected = [[0x7E, 0x30, 0xFE, 0x58], [0, 0, 0, 0], [0xFE, 0x5A, 0x58, 0x01]]
    assert values.view(torch.uint8).tolist() == expected
