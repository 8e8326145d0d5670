"""FP8 products against their plain-torch twin.

T tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.errors import KernelError
from paddock.layers import reference
from paddock.layers.reference import FP8
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import linear_ring, ops_linear_fp8
from paddock_triton.launch import compile_ahead
from paddock_triton.ops_linear_fp8 import cublas_has_more, cublas_takes, linear_fp8, linear_fp8_fast

ON_GPU = torch.cuda.is_available()
HALVES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)  # the interpreter cuts bfloat16 off
TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 130) if ON_GPU else (0, 1, 2, 17, 33, 65)
# Whole blocks, a weight smaller than any block, edges beside them, rows at odd addresses; on a GPU weights whose rows the copy
# engine brings, smaller than a step and larger, of whole tiles and shared ones, and published shapes.
WEIGHTS = [(64, 2048), (3, 5), (67, 2050), (130, 1000), *([(3, 16), (67, 2064), (200, 30000)] if ON_GPU else [])]
PUBLISHED = [(6144, 4096), (10240, 8192), (8192, 8192), (4096, 14336)] if ON_GPU else []


def _given(tokens: int, shape: tuple[int, int], device: torch.device, *, static: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, their scale, a weight and its rows' scales, each scale another."""
    generator = torch.Generator(device).manual_seed(tokens)

    def values(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * 60).clamp(-448, 448).to(FP8)

    def scales(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device) * 0.01 + 0.001

    features, inputs = shape
    return values(tokens, inputs), scales() if static else scales(tokens, 1), values(features, inputs), scales(features, 1)


@pytest.mark.parametrize("static", [True, False], ids=["static", "token"])
@pytest.mark.parametrize("shape", [*(pytest.param(each, marks=pytest.mark.memcheck) for each in WEIGHTS), *PUBLISHED], ids=str)
def test_tokens_meet_every_edge_of_a_weight(shape: tuple[int, int], static: bool, device: torch.device) -> None:
    """No token, one, tiles of each size and more than one tile, whatever the weight's sides; a dtype with each of the scales."""
    dtype = HALVES[static % len(HALVES)]
    for tokens in TOKENS:
        given = _given(tokens, shape, device, static=static)
        with poisoned():
            found = linear_fp8(*given, dtype)
        assert (found.dtype, found.shape) == (dtype, (tokens, shape[0]))
        expected = reference.linear_fp8(*given, torch.float32)
        assert_close(found, expected, op="linear_fp8", dtype=dtype, at=f"T{tokens}")


@pytest.mark.skipif(ON_GPU, reason="the matrix unit keeps 14 bits")
def test_sums_are_float32_s(device: torch.device) -> None:
    """In the interpreter nothing but the order of summation differs from the twin."""
    for tokens in (1, 5):
        given = _given(tokens, (67, 2050), device, static=False)
        assert_close(linear_fp8(*given, torch.float32), reference.linear_fp8(*given, torch.float32), op="linear")


def test_more_tokens_are_cublas_s_where_it_takes_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides multiples of 16, static scales spread over tokens; float16 too on Hopper alone. Else a kernel takes 64 at a time."""
    asked: list[tuple[tuple[int, ...], bool]] = []
    cublas = ops_linear_fp8.cublas

    def noted(*given: Any, fast_accumulation: bool) -> Tensor:
        asked.append((tuple(given[2].shape), fast_accumulation))
        return cublas(*given, fast_accumulation=fast_accumulation)

    monkeypatch.setattr(ops_linear_fp8, "cublas", noted)
    for product, fast in ((linear_fp8, False), (linear_fp8_fast, True)):
        _large_products(product, fast, asked, device)


def _large_products(product: Any, fast: bool, asked: list[tuple[tuple[int, ...], bool]], device: torch.device) -> None:
    """Hold a product of 70 tokens to its twin, and to what cuBLAS was asked for."""
    for shape, dtype, taken in (
        ((32, 64), torch.bfloat16, True),
        ((32, 64), torch.float16, ON_GPU),
        ((33, 64), torch.float16, False),
        ((32, 72), torch.float16, False),
    ):
        for static in (True, False):
            given = _given(70, shape, device, static=static)
            found, op = product(*given, dtype), "linear_fp8_fast" if fast else "linear_fp8"
            assert_close(found, reference.linear_fp8(*given, torch.float32), op=op, dtype=dtype)
        assert asked == ([(shape, fast)] * 2 if taken else [])
        asked.clear()


@pytest.mark.parametrize(("cuda", "more"), [(None, False), ("12.6", False), ("12.8", False), ("12.9", True), ("13.0", True)])
def test_what_cublas_has_more_depends_on_cuda_and_the_device(
    cuda: str | None, more: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with scales of blocks, and of other dtypes than bfloat16: elsewhere kernels take them."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(ops_linear_fp8, "runs_on", lambda _device: True)
    values_TI, weight_OI = torch.zeros(70, 64).to(FP8), torch.zeros(32, 64).to(FP8)
    assert cublas_has_more(device) == more
    assert [cublas_takes(values_TI, weight_OI, dtype) for dtype in (torch.bfloat16, torch.float16)] == [True, more]
    monkeypatch.setattr(ops_linear_fp8, "runs_on", lambda _device: False)
    assert not cublas_has_more(device)


def test_rows_of_tokens_may_lie_apart(device: torch.device) -> None:
    """A slice of a wider activation at an odd offset, one token of it, and a transposed weight give what copies give."""
    wide_TI, _, weight_OI, weight_scale_O1 = _given(5, (40, 200), device, static=False)
    weight_OI, scale_T1 = weight_OI[:, :64].contiguous(), torch.rand(5, 1, device=device)
    for rows in (slice(0, 5), slice(2, 3)):
        x_TI = wide_TI[rows, 7:71]
        found = linear_fp8(x_TI, scale_T1[rows], weight_OI, weight_scale_O1, torch.float16)
        assert torch.equal(found, linear_fp8(x_TI.contiguous(), scale_T1[rows], weight_OI, weight_scale_O1, torch.float16))
        turned_OI = weight_OI.T.contiguous().T
        assert torch.equal(found, linear_fp8(x_TI, scale_T1[rows], turned_OI, weight_scale_O1, torch.float16))


def test_a_token_does_not_depend_on_how_many_share_its_tile(device: torch.device) -> None:
    """A row has the same bits whoever is beside it, so padding changes nothing: up to 16 tokens, on a GPU up to 32."""
    most = 32 if ON_GPU else 16
    for shape in ((70, 256), *([(10240, 8192), (4096, 4096)] if ON_GPU else [])):
        x_TI, scale_T1, weight_OI, weight_scale_O1 = _given(most, shape, device, static=False)
        together = linear_fp8(x_TI, scale_T1, weight_OI, weight_scale_O1, torch.float16)
        for count in (1, 2, 3, 8, 9, most // 2 + 1):
            alone = linear_fp8(x_TI[:count], scale_T1[:count], weight_OI, weight_scale_O1, torch.float16)
            assert torch.equal(alone, together[:count])


@pytest.mark.skipif(not ON_GPU, reason="captures a graph")
def test_a_captured_product_reads_what_is_there_when_it_is_replayed(device: torch.device) -> None:
    """Tokens and scales that changed since, again and again, of whole tiles and of shared ones, whose counters end at zero."""
    for shape in ((10240, 8192), (8192, 8192)):
        for tokens in (1, 40):
            given = _given(tokens, shape, device, static=False)
            linear_fp8(*given, torch.bfloat16)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs = [linear_fp8(*given, torch.bfloat16) for _ in range(3)]
            for turn in range(3):
                x_TI, scale_T1, *_ = _given(tokens + turn, shape, device, static=False)
                given[0].copy_(x_TI[:tokens])
                given[1].copy_(scale_T1[:tokens])
                graph.replay()
                assert all(torch.equal(out_TO, linear_fp8(*given, torch.bfloat16)) for out_TO in outs)


def test_a_product_s_largest_values_are_finite(device: torch.device) -> None:
    """448 times 448, 8,192 times over, overflows no sum."""
    for tokens in (1, 2):
        x_TI, weight_OI = (torch.full((rows, 8192), 448.0, device=device).to(FP8) for rows in (tokens, 4))
        scale, weight_scale_O1 = torch.tensor(2.0**-8, device=device), torch.full((4, 1), 2.0**-8, device=device)
        found = linear_fp8(x_TI, scale, weight_OI, weight_scale_O1, torch.float16)
        assert torch.equal(found, torch.full((tokens, 4), 448 * 448 * 8192 / 2**16, dtype=torch.float16, device=device))


def test_nothing_is_multiplied_while_kernels_compile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of cuBLAS compiles nothing, so there is none."""
    monkeypatch.setattr(ops_linear_fp8, "cublas", None)
    monkeypatch.setattr("paddock_triton.launch._start_triton", lambda: None)
    with compile_ahead(device):
        assert linear_fp8(*_given(70, (32, 64), device, static=True), torch.bfloat16).shape == (70, 32)


@pytest.mark.parametrize("what", ["_few_kernel", "cublas", *(["_ring_kernel"] if ON_GPU else [])])
def test_a_product_that_fails_names_itself_and_the_way_out(
    what: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever multiplies: the op, its tensors, the cause, and the option that takes the core's own."""

    class Failing:
        """A kernel, and a call, that fail."""

        def __getitem__(self, grid: object) -> Failing:
            return self

        def __call__(self, *_: object, **__: object) -> Tensor:
            """Fail."""
            raise RuntimeError("no such product")

    monkeypatch.setattr(linear_ring if what == "_ring_kernel" else ops_linear_fp8, what, Failing())
    tokens, inputs = {"_ring_kernel": (1, 64), "_few_kernel": (2, 60), "cublas": (70, 64)}[what]
    with pytest.raises(KernelError, match="no such product") as caught:
        linear_fp8(*_given(tokens, (32, inputs), device, static=False), torch.bfloat16)
    said = f"kernel linear_fp8 does not run on values_TI [{tokens}, {inputs}] float8_e4m3fn, x_scale [{tokens}, 1] float32"
    assert caught.value.message.startswith(said)
    assert "--op linear_fp8=paddock" in caught.value.fix
