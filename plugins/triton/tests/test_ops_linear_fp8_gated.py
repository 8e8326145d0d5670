"""FP8 products that end in silu(gate) * up, against the product and then the activation, bit for bit.

T tokens, I input features, F feed-forward size, O = 2F output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.errors import KernelError
from paddock.layers import QuantizedActivation, reference
from paddock.layers.reference import FP8
from paddock.testing.oracle import poisoned
from paddock_triton import linear_ring, ops_linear_fp8_gated
from paddock_triton.linear_ring import launch_ring_gated, tile_for
from paddock_triton.ops_activation_fp8 import silu_mul_fp8
from paddock_triton.ops_linear_fp8 import linear_fp8, linear_fp8_fast
from paddock_triton.ops_linear_fp8_gated import linear_silu_mul_fp8, linear_silu_mul_fp8_fast

ON_GPU = torch.cuda.is_available()
ONE_KERNEL = pytest.mark.skipif(not ON_GPU, reason="the kernel that does both is Hopper's")
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)  # the interpreter cuts bfloat16 off
TOKENS = (0, 1, 2, 8, 9, 16, 17, 32, 33, 63, 64, 65, 130)
# (F, I): whole tiles and odd sides, edges beside whole tiles, what the copy engine does not bring or brings in part of a step,
# widths that are no eights of features, tiles that would be shared, and published shapes.
WEIGHTS = [(64, 512), (33, 1026), (1, 5), (67, 264), (72, 272), (8, 16), (20, 512), (64, 30000)]
PUBLISHED = [(5120, 8192), (14336, 4096), (28672, 8192)]
SCALES = (0.07, 1e-4)  # the second saturates most of what is not near zero
PRODUCTS = {linear_silu_mul_fp8: linear_fp8, linear_silu_mul_fp8_fast: linear_fp8_fast}
TIPPED = 0.03 if ON_GPU else 1e-3  # FP8 values beside the twin's: sums in 14 bits (modelled: 1.1 to 1.6 %), or in another order


def _given(
    tokens: int, shape: tuple[int, int], device: torch.device, *, static: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, their scale, a weight and its rows' scales, for gates and ups of about one."""
    generator = torch.Generator(device).manual_seed(tokens)

    def values(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * 60).clamp(-448, 448).to(FP8)

    def scales(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device) + 1.0

    width, inputs = shape
    weight_scale_O1 = scales(2 * width, 1) * inputs**-0.5 / 90
    return values(tokens, inputs), (scales() if static else scales(tokens, 1)) / 90, values(2 * width, inputs), weight_scale_O1


def _apart(given: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype, scale: Tensor) -> QuantizedActivation:
    """Return what the product's kernel and then the activation's make."""
    return silu_mul_fp8(linear_fp8(*given, dtype), scale, None)


def _bits(found: QuantizedActivation) -> Tensor:
    return found.values_TI.view(torch.uint8)


@ONE_KERNEL
@pytest.mark.parametrize("static", [True, False], ids=["static", "token"])
@pytest.mark.parametrize("shape", [*(pytest.param(each, marks=pytest.mark.memcheck) for each in WEIGHTS), *PUBLISHED], ids=str)
def test_one_kernel_gives_the_bits_of_two(shape: tuple[int, int], static: bool, device: torch.device) -> None:
    """No token, one, tiles of each size and more than a tile, whatever the weight's sides; a dtype with each way to scale x."""
    dtype = DTYPES[static % len(DTYPES)]
    for tokens in TOKENS:
        given = _given(tokens, shape, device, static=static)
        for value in SCALES:
            scale = torch.tensor(value, device=device)
            with poisoned():
                found = linear_silu_mul_fp8(*given, dtype, scale)
            assert (found.values_TI.dtype, found.values_TI.shape) == (FP8, (tokens, shape[0]))
            assert found.scale is scale
            assert torch.equal(_bits(found), _bits(_apart(given, dtype, scale))), f"T{tokens} scale {value}"


@ONE_KERNEL
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 64, 65, 130])
def test_fast_sums_give_the_bits_of_the_fast_product_and_an_activation(tokens: int, device: torch.device) -> None:
    """For more than 64 tokens, which may be summed in fewer bits, and for fewer, which are not."""
    dtype, scale = DTYPES[0], torch.tensor(SCALES[0], device=device)
    given = _given(tokens, (2048, 4096), device, static=False)
    with poisoned():
        found = linear_silu_mul_fp8_fast(*given, dtype, scale)
    expected = silu_mul_fp8(linear_fp8_fast(*given, dtype), scale, None)
    assert found.scale is scale
    assert torch.equal(_bits(found), _bits(expected))
    assert tokens > 64 or torch.equal(_bits(found), _bits(linear_silu_mul_fp8(*given, dtype, scale)))


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("op", PRODUCTS)
def test_next_to_all_values_are_the_twin_s(op: Callable[..., QuantizedActivation], device: torch.device) -> None:
    """Gates, ups and their scales are of the right rows; sums in another order tip few values to the one beside."""
    scale = torch.tensor(SCALES[0], device=device)
    for dtype in DTYPES:
        for tokens in (1, 7, 33):
            given = _given(tokens, (1032 if ON_GPU else 131, 528), device)
            found = op(*given, dtype, scale)
            expected = getattr(reference, op.__name__)(*given, dtype, scale)
            assert (found.values_TI.float() != expected.values_TI.float()).float().mean() <= TIPPED
            assert len(set(_bits(expected).flatten().tolist())) > 50


def _noted(function: Callable[..., Any], called: list[str]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        called.append(function.__name__)
        return function(*args)

    return noted


@pytest.mark.parametrize("op", PRODUCTS)
def test_what_a_ring_does_not_serve_takes_two_kernels(
    op: Callable[..., QuantizedActivation], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 64 tokens, rows at odd addresses, features that are no eights, tiles to be shared: the op's own sums' product."""
    launched: list[str] = []
    for name in ("launch_ring_gated", "linear_fp8", "linear_fp8_fast"):
        monkeypatch.setattr(ops_linear_fp8_gated, name, _noted(getattr(ops_linear_fp8_gated, name), launched))
    scale = torch.tensor(SCALES[0], device=device)
    for tokens, shape, fused in (
        *((1, (32, 64), True), (64, (32, 64), True), (65, (32, 64), False)),
        *((1, (32, 72), False), (1, (33, 64), False), *([(1, (64, 30000), False)] if ON_GPU else [])),
    ):
        given = _given(tokens, shape, device)
        found = op(*given, torch.float16, scale)
        assert launched == ["launch_ring_gated" if fused and ON_GPU else PRODUCTS[op].__name__], (tokens, shape)
        assert torch.equal(_bits(found), _bits(_apart(given, torch.float16, scale)))
        launched.clear()


def test_rows_of_tokens_may_lie_apart(device: torch.device) -> None:
    """A slice of a wider activation at an odd offset, one token of it, and a transposed weight give what copies give."""
    wide_TI, _, weight_OI, weight_scale_O1 = _given(5, (20, 200), device)
    weight_OI, x_scale_T1 = weight_OI[:, :64].contiguous(), torch.rand(5, 1, device=device)
    scale = torch.tensor(SCALES[0], device=device)
    for rows in (slice(0, 5), slice(2, 3)):
        x_TI = wide_TI[rows, 7:71]
        rest = (weight_scale_O1, torch.float16, scale)
        found = linear_silu_mul_fp8(x_TI, x_scale_T1[rows], weight_OI, *rest)
        for each_TI, each_OI in ((x_TI.contiguous(), weight_OI), (x_TI, weight_OI.T.contiguous().T)):
            assert torch.equal(_bits(found), _bits(linear_silu_mul_fp8(each_TI, x_scale_T1[rows], each_OI, *rest)))


@ONE_KERNEL
@pytest.mark.parametrize("width", [40, 64])
def test_nothing_is_written_beside_the_result(width: int, device: torch.device) -> None:
    """Memory before and behind it stays as it was, whether the last tile is whole or not."""
    scale = torch.tensor(SCALES[0], device=device)
    for tokens in (1, 3, 20):
        given = _given(tokens, (width, 64), device)
        around = torch.full((tokens * width + 128,), 77, device=device).to(torch.uint8)
        out = QuantizedActivation(around[64:-64].view(FP8).view(tokens, width), scale)
        launch_ring_gated(out, *given, torch.float16, tile_for(tokens, given[2]))
        assert torch.equal(_bits(out), _bits(_apart(given, torch.float16, scale)))
        assert bool((around[:64] == 77).all())
        assert bool((around[-64:] == 77).all())


def test_a_gate_and_an_up_out_of_range_saturate(device: torch.device) -> None:
    """49 times 49 becomes the largest FP8 value, with the sign of up, and what has a gate of -49 zero."""
    signs_O1 = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0], device=device)[:, None]  # gates of three features, their ups
    scale = torch.tensor(1.0, device=device)
    for tokens in (1, 3):
        x_TI, weight_OI = torch.full((tokens, 64), 448.0, device=device).to(FP8), (448 * signs_O1).expand(6, 64).to(FP8)
        weight_scale_O1 = torch.full((6, 1), 2.0**-18, device=device)
        found = linear_silu_mul_fp8(x_TI, scale, weight_OI, weight_scale_O1, torch.float16, scale)
        expected = torch.tensor([448.0, -448.0, 0.0], device=device)
        assert torch.equal(found.values_TI.float(), expected.expand(tokens, 3))


class Failing:
    """A kernel that fails."""

    def __getitem__(self, grid: object) -> Failing:
        return self

    def __call__(self, *_: object, **__: object) -> None:
        """Fail."""
        raise RuntimeError("no such product")


@ONE_KERNEL
@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_that_fails_names_itself_and_the_way_out(
    op: Callable[..., QuantizedActivation], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op, its tensors, the cause, and the option that takes product and activation apart."""
    monkeypatch.setattr(linear_ring, "_ring_kernel", Failing())
    given: Any = (*_given(2, (16, 64), device), torch.bfloat16, torch.tensor(1.0, device=device))
    with pytest.raises(KernelError, match="no such product") as caught:
        op(*given)
    said = f"kernel {op.__name__} does not run on values_TI [2, 64] float8_e4m3fn"
    assert caught.value.message.startswith(said)
    assert f"--op {op.__name__}=paddock (" in caught.value.fix


def test_as_many_ups_as_gates(device: torch.device) -> None:
    """An odd number of rows is no weight of gate and up."""
    x_TI, weight_OI = torch.zeros(1, 16, device=device).to(FP8), torch.zeros(5, 16, device=device).to(FP8)
    one = torch.tensor(1.0, device=device)
    with pytest.raises(AssertionError, match="5 rows are not as many gates as ups"):
        linear_silu_mul_fp8(x_TI, one, weight_OI, one.expand(5, 1), torch.float16, one)
