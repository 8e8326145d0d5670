"""FP8 products with scales of blocks against their plain-torch twin.

T tokens, I input features, O output features, Q runs of outputs, G groups of inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from paddock.errors import KernelError
from paddock.layers import reference
from paddock.layers.reference import FP8
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import linear_ring, ops_linear_fp8_blocks
from paddock_triton.launch import compile_ahead
from paddock_triton.ops_linear_fp8_blocks import GROUP, linear_fp8_blocks

ON_GPU = torch.cuda.is_available()
HALVES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)  # the interpreter cuts bfloat16 off
TOKENS = (0, 1, 2, 7, 16, 17, 33, 64, 65, 130, 1300) if ON_GPU else (0, 1, 2, 17, 33, 65, 130)
# Whole blocks, a weight smaller than any block, edges beside them, and published shapes; with outputs to a scale.
WEIGHTS = [((256, 384), 128), ((3, 5), 128), ((67, 300), 1), ((192, 1000), 64), ((130, 260), 2)] + (
    [((200, 2064), 128), ((272, 2064), 128), ((144, 1040), 64), ((6144, 4096), 128), ((4096, 14336), 128), ((7168, 18432), 128)]
    if ON_GPU
    else []
)
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]


def _given(tokens: int, shape: tuple[int, int], outs: int, device: torch.device) -> Given:
    """Return values, their scales, a weight and its blocks' scales, each scale another, and the block."""
    generator = torch.Generator(device).manual_seed(tokens)
    (features, inputs), groups = shape, -(-shape[1] // GROUP)

    def values(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * 60).clamp(-448, 448).to(FP8)

    def scales(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device) * 0.01 + 0.001

    runs = -(-features // outs)
    return values(tokens, inputs), scales(tokens, groups), values(features, inputs), scales(runs, groups), (outs, GROUP)


@pytest.mark.memcheck
@pytest.mark.parametrize(("shape", "outs"), WEIGHTS, ids=str)
def test_tokens_meet_every_edge_of_a_weight(shape: tuple[int, int], outs: int, device: torch.device) -> None:
    """No token, one, tiles of each size and more than eight, whatever the weight's sides and the outputs to a scale."""
    for turn, tokens in enumerate(TOKENS):
        dtype, given = HALVES[turn % len(HALVES)], _given(tokens, shape, outs, device)
        with poisoned():
            found = linear_fp8_blocks(*given, dtype)
        assert (found.dtype, found.shape) == (dtype, (tokens, shape[0]))
        expected = reference.linear_fp8_blocks(*given, torch.float32)
        assert_close(found, expected, op="linear_fp8_blocks", dtype=dtype, at=f"T{tokens}")


@pytest.mark.skipif(ON_GPU, reason="the matrix unit keeps 14 bits")
def test_sums_are_float32_s(device: torch.device) -> None:
    """In the interpreter nothing but the order of summation differs from the twin."""
    for tokens in (1, 5):
        given = _given(tokens, (67, 1000), 32, device)
        assert_close(linear_fp8_blocks(*given, torch.float32), reference.linear_fp8_blocks(*given, torch.float32), op="linear")


def test_rows_of_tokens_may_lie_apart(device: torch.device) -> None:
    """A slice of a wider activation, of its scales, one token of it, and a transposed weight give what copies give."""
    wide_TI, scale_TG, weight_OI, scale_QG, block = _given(5, (40, 600), 32, device)
    weight_OI, wide_scale_TG = weight_OI[:, :256].contiguous(), scale_TG
    for rows in (slice(0, 5), slice(2, 3)):
        x_TI, x_scale_TG, weight_scale_QG = wide_TI[rows, 7:263], wide_scale_TG[rows, 1:3], scale_QG[:, :2]
        found = linear_fp8_blocks(x_TI, x_scale_TG, weight_OI, weight_scale_QG, block, torch.float16)
        turned_OI = weight_OI.T.contiguous().T
        copies = x_TI.contiguous(), x_scale_TG.contiguous(), turned_OI, weight_scale_QG.contiguous()
        assert torch.equal(found, linear_fp8_blocks(*copies, block, torch.float16))


def test_a_token_does_not_depend_on_how_many_share_its_tile(device: torch.device) -> None:
    """Two to sixteen tokens are one tile: a row has the same bits whoever is beside it, so padding changes nothing."""
    for shape in ((70, 300), (200, 4096)):
        x_TI, scale_TG, weight_OI, scale_QG, block = _given(16, shape, 128, device)
        together = linear_fp8_blocks(x_TI, scale_TG, weight_OI, scale_QG, block, torch.float16)
        for count in (2, 3, 8):
            alone = linear_fp8_blocks(x_TI[:count], scale_TG[:count], weight_OI, scale_QG, block, torch.float16)
            assert torch.equal(alone, together[:count])


def test_more_than_eight_tiles_of_tokens_are_all_multiplied(device: torch.device) -> None:
    """Tiles are taken in runs of eight, the last run shorter; each meets every block of outputs."""
    for tokens in (1024, 1100):
        given = _given(tokens, (131, 5), 128, device)
        with poisoned():
            found = linear_fp8_blocks(*given, torch.float16)
        assert_close(found, reference.linear_fp8_blocks(*given, torch.float32), op="linear_fp8_blocks")


@pytest.mark.gpu
def test_few_tokens_are_the_ring_s_and_many_cublas_s_where_they_take_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of 64 outputs have no product of cuBLAS, and those of 32, or rows of 8 inputs more than whole sixteens, no ring."""
    asked: list[str] = []

    def noted(name: str) -> None:
        really = getattr(ops_linear_fp8_blocks, name)

        def note(*given: Any) -> Any:
            asked.append(name)
            return really(*given)

        monkeypatch.setattr(ops_linear_fp8_blocks, name, note)

    for name in ("launch_ring_blocks", "cublas_blocks", "launch_one", "launch_few"):
        noted(name)
    for shape, outs, taken in (
        ((256, 256), 128, ["launch_ring_blocks", "launch_ring_blocks", "cublas_blocks"]),
        ((256, 256), 64, ["launch_ring_blocks", "launch_ring_blocks", "launch_few"]),
        ((256, 256), 32, ["launch_one", "launch_few", "launch_few"]),
        ((256, 264), 128, ["launch_one", "launch_few", "launch_few"]),
    ):
        for tokens in (1, 64, 65):
            linear_fp8_blocks(*_given(tokens, shape, outs, device), torch.float16)
        assert asked == taken, (shape, outs)
        asked.clear()


def test_nothing_is_multiplied_while_kernels_compile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of cuBLAS compiles nothing, so there is none."""
    monkeypatch.setattr(ops_linear_fp8_blocks, "cublas_blocks", None)
    monkeypatch.setattr(ops_linear_fp8_blocks, "_cublas_takes", lambda *_: True)
    monkeypatch.setattr("paddock_triton.launch._start_triton", lambda: None)
    with compile_ahead(device):
        assert linear_fp8_blocks(*_given(70, (128, 128), 128, device), torch.bfloat16).shape == (70, 128)


def test_blocks_of_other_widths_are_refused(device: torch.device) -> None:
    """With the width, and the way out."""
    x_TI, scale_TG, weight_OI, scale_QG, _ = _given(2, (32, 256), 128, device)
    with pytest.raises(KernelError, match="no kernel multiplies blocks of 64 inputs") as caught:
        linear_fp8_blocks(x_TI, scale_TG, weight_OI, scale_QG, (128, 64), torch.float16)
    assert "--op linear_fp8_blocks=paddock" in caught.value.fix


@pytest.mark.parametrize("what", ["_block_one_kernel", "_block_few_kernel", "_ring_kernel"])
def test_a_product_that_fails_names_itself_and_the_way_out(
    what: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever multiplies: the op, its tensors, the cause, and the option that takes the core's own."""

    class Failing:
        """A kernel that fails."""

        def __getitem__(self, grid: object) -> Failing:
            return self

        def __call__(self, *_: object, **__: object) -> None:
            """Fail."""
            raise RuntimeError("no such product")

    ring = what == "_ring_kernel"
    monkeypatch.setattr(linear_ring if ring else ops_linear_fp8_blocks, what, Failing())
    monkeypatch.setattr(ops_linear_fp8_blocks, "serves", lambda values_TI, weight_OI: ring)
    monkeypatch.setattr(linear_ring, "processors", lambda _device: 132)
    tokens = 1 if "one" in what else 2
    with pytest.raises(KernelError, match="no such product") as caught:
        linear_fp8_blocks(*_given(tokens, (32, 256), 128, device), torch.bfloat16)
    assert caught.value.message.startswith(f"kernel linear_fp8_blocks does not run on values_TI [{tokens}, 256] float8_e4m3fn")
    assert "--op linear_fp8_blocks=paddock" in caught.value.fix
