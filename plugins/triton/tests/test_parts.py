"""Rows that several programs share, in two launches, against the twin and against rows by one program.

T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import QuantizedActivation, reference
from paddock.testing.oracle import poisoned
from paddock_triton import ops_activation, ops_activation_fp8, ops_quantize, parts
from paddock_triton.fp8 import empty_fp8
from paddock_triton.launch import compile_ahead
from paddock_triton.parts import LEAST_WIDTH, MOST_ALONE, MOST_PROGRAMS, Kind, in_parts

KINDS: tuple[Kind, ...] = get_args(Kind)
ON_GPU = torch.cuda.is_available()
WIDTHS = (12288, 14848, 33001, 41472, 53248, 59391, 59392) if ON_GPU else (12288, 59391)
BOUNDS = (None, 0.75)
PLAIN: dict[Kind, Callable[[Tensor], Tensor]] = {
    "silu_mul": ops_activation.silu_mul,
    "gelu": ops_activation.gelu,
    "plain": lambda x_TX: x_TX,
}
OPS: dict[Kind, Callable[[Tensor], QuantizedActivation]] = {
    "silu_mul": lambda x_TX: ops_activation_fp8.silu_mul_fp8(x_TX, None, None),
    "gelu": lambda x_TX: ops_activation_fp8.gelu_fp8(x_TX, None, None),
    "plain": ops_quantize.quantize_fp8_token,
}


def _given(kind: Kind, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    wide = 2 * width if kind == "silu_mul" else width
    x_TX = torch.randn(tokens, wide, generator=torch.Generator().manual_seed(width))
    x_TX[1:2] = 0.0
    x_TX[2:3, -1] = 5e3  # the largest in the last part
    return x_TX.to(device, dtype)


def _bounds(turn: int) -> tuple[float | None, ...]:
    """Return both where there is a GPU, elsewhere the one whose turn it is."""
    return BOUNDS if ON_GPU else BOUNDS[turn % 2 :][:1]


def _in_parts(kind: Kind, x_TX: Tensor, width: int, bound: float | None) -> QuantizedActivation:
    with poisoned():
        found = empty_fp8(x_TX, width, None)
        parts.launch_parts(found, x_TX, bound, kind)
    return found


def _alone(kind: Kind, x_TX: Tensor, width: int, bound: float | None) -> QuantizedActivation:
    """Return rows by one program each; an activation wider than one holds is computed first and then quantised."""
    found = empty_fp8(x_TX, width, None)
    if kind == "plain" or width > MOST_ALONE:
        ops_quantize.launch_rows(found, PLAIN[kind](x_TX), bound)
    else:
        ops_activation_fp8.launch_rows(found, x_TX, bound, kind)
    return found


def _same(found: QuantizedActivation, expected: QuantizedActivation, at: object) -> None:
    assert torch.equal(found.scale, expected.scale.to(found.scale.device)), at
    values_TI, expected_TI = found.values_TI.float(), expected.values_TI.float().to(found.scale.device)
    assert torch.equal(values_TI.nan_to_num(1e3), expected_TI.nan_to_num(1e3)), at  # none but NaN is 1000


def _expected(h_TF: Tensor, bound: float | None) -> QuantizedActivation:
    """Return the twin's, computed on the CPU; a NaN stays one and has no part in its row's scale, as in the kernels."""
    h_TF = h_TF.cpu()
    found = reference.quantize_fp8_token(h_TF.nan_to_num(0.0), bound)
    values_TF = torch.where(h_TF.isnan(), torch.nan, found.values_TI.float())
    return QuantizedActivation(values_TF.to(torch.float8_e4m3fn), found.scale)


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_parts_have_the_twin_s_bits(kind: Kind, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Odd widths too, bounded or not: rows of zeros, with the largest in the last part, with a NaN."""
    for turn, width in enumerate(WIDTHS):
        for tokens in (1, 3):
            x_TX = _given(kind, tokens, width, dtypes[turn % len(dtypes)], device)
            x_TX[0, width // 2] = torch.nan if tokens > 1 else 9.0
            for bound in _bounds(turn + tokens // 2):
                found = _in_parts(kind, x_TX, width, bound)
                _same(found, _expected(PLAIN[kind](x_TX), bound), (width, tokens, bound))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_parts_have_the_bits_of_one_program_s(kind: Kind, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Whatever rounds: rows that lie apart, with NaN between them; narrower than a part, of a few, too wide for a program."""
    for turn, width in enumerate((2, 126, 6200, 12288, 28672, 33001)):
        x_TX = _given(kind, 3, width, dtypes[-1], device)
        apart_TX = torch.full((3, x_TX.shape[1] + 5), torch.nan, dtype=x_TX.dtype, device=device)[:, 3:-2].copy_(x_TX)
        for bound in _bounds(turn):
            _same(_in_parts(kind, apart_TX, width, bound), _alone(kind, x_TX, width, bound), (width, bound))


def test_rows_are_in_parts_where_tokens_are_few_or_an_activation_is_too_wide() -> None:
    """From 12,288 features on up to 264 programs; activations of more than 32,768 always, the quantisation alone not."""
    for kind in KINDS:
        assert not in_parts(1, LEAST_WIDTH - 1, kind)
        assert [in_parts(tokens, LEAST_WIDTH, kind) for tokens in (1, 44, 45)] == [True, True, False]  # 6 parts: 264, 270
        assert [in_parts(tokens, 14336, kind) for tokens in (37, 38, 4096)] == [True, False, False]  # 7 parts: 259, 266
        assert [in_parts(tokens, MOST_ALONE, kind) for tokens in (16, 17, 4096)] == [True, False, False]  # 16 parts: 256, 272
        assert [in_parts(tokens, 59392, kind) for tokens in (9, 10, 4096)] == [True, kind != "plain", kind != "plain"]
        assert in_parts(4096, MOST_ALONE + 1, kind) == (kind != "plain")
        for width in range(2, MOST_ALONE, 1000):
            for tokens in (1, 8, 64, 300):
                programs = tokens * -(-width // 2048)
                assert in_parts(tokens, width, kind) == (width >= 12288 and programs <= MOST_PROGRAMS)


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that the ways ops take are added to, of which nothing is launched."""
    taken: list[str] = []
    monkeypatch.setattr(parts, "launch_parts", lambda *_: taken.append("parts"))
    for module in (ops_activation_fp8, ops_quantize):
        monkeypatch.setattr(module, "launch_rows", lambda *_: taken.append("alone"))
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_an_op_launches_what_is_chosen_for_its_rows(kind: Kind, device: torch.device, took: list[str]) -> None:
    """Narrow rows, few of 12,288, many of them, and many too wide for an activation's program."""
    for tokens, width in ((1, 8192), (1, 12288), (45, 12288), (16, 32769)):
        OPS[kind](_given(kind, tokens, width, torch.float16, device))
    assert took == ["alone", "parts", "alone", "alone" if kind == "plain" else "parts"]


@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize("kind", KINDS)
def test_what_any_number_of_tokens_takes_is_compiled_ahead(
    kind: Kind, tokens: int, device: torch.device, took: list[str]
) -> None:
    """A step compiles nothing amid serving: both ways were asked for where its tokens choose, one where they do not."""
    for width in (8192, 12288, 33001):
        with compile_ahead(device):
            OPS[kind](_given(kind, tokens, width, torch.float16, device))
        assert (
            took
            == {8192: ["alone"], 12288: ["parts", "alone"], 33001: ["parts", "alone"] if kind == "plain" else ["parts"]}[width]
        )
        took.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_can_replay_rows_that_are_shared(kind: Kind, device: torch.device) -> None:
    """One launch behind the other, each early, over and over: the bits stay those of one program a row."""
    for tokens in (1, 2, 8, 150):  # of the last only activations too wide for a program are shared
        given = [(_given(kind, tokens, width, torch.bfloat16, device), width) for width in (14848, 28672, 59392)]
        for x_TX, _ in given:
            OPS[kind](x_TX)
        torch.cuda.synchronize()
        graph, found = torch.cuda.CUDAGraph(), list[QuantizedActivation]()
        with torch.cuda.graph(graph):
            found += [OPS[kind](x_TX) for _ in range(10) for x_TX, _ in given]
        for _ in range(20):
            graph.replay()
        expected = [_alone(kind, x_TX, width, None) for x_TX, width in given]
        for number, each in enumerate(found):
            _same(each, expected[number % len(given)], (tokens, number))
