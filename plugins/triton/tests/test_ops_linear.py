"""Products of few tokens with a weight, and rows of a table, against their plain-torch twins.

T tokens, I input features, O output features.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton.linear_ring import TILES, serves
from paddock_triton.ops_embed import embed
from paddock_triton.ops_linear import linear

ON_GPU = torch.cuda.is_available()
TOKENS = (1, 2, 7, 16, 17, 32, 33, 63, 64, 65) if ON_GPU else (1, 2, 17, 33)
# Whole blocks, a weight smaller than any block, edges beside them, and a published shape.
WEIGHTS = [(64, 2048), (3, 5), (67, 2050), (130, 1000), *([(6144, 4096), (4096, 14336)] if ON_GPU else [])]


@pytest.mark.memcheck
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_few_tokens_meet_every_edge_of_a_weight(shape: tuple[int, int], device: torch.device, dtypes: list[torch.dtype]) -> None:
    """From one token to more than the kernels take, blocks that do not divide the weight included."""
    generator = torch.Generator(device).manual_seed(0)
    for dtype in dtypes:
        weight_OI = (torch.randn(shape, generator=generator, device=device) * shape[1] ** -0.5).to(dtype)
        for tokens in TOKENS:
            x_TI = torch.randn(tokens, shape[1], generator=generator, device=device).to(dtype)
            with poisoned():
                found = linear(x_TI, weight_OI)
            assert found.dtype == dtype
            assert_close(found, reference.linear(x_TI.double(), weight_OI.double()), op="linear", dtype=dtype, at=f"T{tokens}")


@pytest.mark.skipif(not ON_GPU, reason="the kernel is Hopper's")
@pytest.mark.parametrize("shape", [(3, 8), (67, 2056), (200, 30000), (10240, 8192)], ids=str)
def test_the_ring_takes_whole_tiles_and_shared_ones(
    shape: tuple[int, int], device: torch.device, halves: list[torch.dtype]
) -> None:
    """In whole tiles or shared ones, with edges beside them, inputs that fill no step."""
    generator = torch.Generator(device).manual_seed(0)
    for dtype in halves:
        weight_OI = (torch.randn(shape, generator=generator, device=device) * shape[1] ** -0.5).to(dtype)
        for tokens in (each for each in TOKENS if each <= max(TILES)):
            x_TI = torch.randn(tokens, shape[1], generator=generator, device=device).to(dtype)
            assert serves(x_TI, weight_OI)
            with poisoned():
                found = linear(x_TI, weight_OI)
            assert_close(found, reference.linear(x_TI.double(), weight_OI.double()), op="linear", dtype=dtype, at=f"T{tokens}")


def test_rows_of_tokens_may_lie_apart(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """A slice of a wider activation, and a transposed weight, give what their copies give."""
    for dtype in dtypes:
        wide, weight_OI = torch.randn(5, 200, device=device).to(dtype), torch.randn(40, 64, device=device).to(dtype)
        for x_TI in (wide[:, 7:71], wide[2:3, 7:71]):
            assert_close(linear(x_TI, weight_OI), linear(x_TI.contiguous(), weight_OI), op="linear", dtype=dtype)
            turned = weight_OI.T.contiguous().T
            assert_close(linear(x_TI, turned), linear(x_TI, weight_OI).double(), op="attention", dtype=dtype)


def test_a_token_does_not_depend_on_how_many_share_its_step(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Of two to 16, by the ring to 32: a row has the same bits whoever is beside it, so padding changes nothing."""
    tokens, counts = (32, (2, 3, 8, 9, 16, 17)) if ON_GPU else (16, (2, 3, 8))
    for dtype in dtypes:
        x_TI, weight_OI = torch.randn(tokens, 256, device=device).to(dtype), torch.randn(70, 256, device=device).to(dtype)
        if dtype != torch.float32:
            together = linear(x_TI, weight_OI)
            assert all(torch.equal(linear(x_TI[:count], weight_OI), together[:count]) for count in counts)


def test_embed_copies_rows(device: torch.device) -> None:
    """Rows wider than a block, of a table that is a slice, come out as they are."""
    table_VE = torch.randn(20, 1600, device=device)[:, :1500]
    ids_T = torch.tensor([3, 0, 19, 3], device=device)
    with poisoned():
        assert torch.equal(embed(ids_T, table_VE), table_VE[ids_T])
