"""Rows that several programs share, in one launch or two, against rows by one program.

T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from paddock.layers import QuantizedActivation, reference
from paddock.testing.oracle import poisoned
from paddock_triton import meeting, ops_activation, ops_activation_fp8, ops_quantize
from paddock_triton.counters import counters
from paddock_triton.fp8 import empty_fp8

ON_GPU = torch.cuda.is_available()
WIDTHS = (12288, 14848, 28672, 53248, 59392) if ON_GPU else (6200,)
WIDE = (33001, 41472, 53248, 59391, 59392)
Launch = Callable[[QuantizedActivation, Tensor, float | None], None]
SHARED = {
    "quantize": ops_quantize.launch_shared,
    "silu_mul": partial(ops_activation_fp8.launch_shared, gated=True),
    "gelu": partial(ops_activation_fp8.launch_shared, gated=False),
}
ALONE: dict[str, Launch] = {
    "quantize": ops_quantize.launch_rows,
    "silu_mul": partial(ops_activation_fp8.launch_rows, gated=True),
    "gelu": partial(ops_activation_fp8.launch_rows, gated=False),
}
TWICE = {
    "quantize": ops_quantize.launch_twice,
    "silu_mul": partial(ops_activation_fp8.launch_twice, gated=True),
    "gelu": partial(ops_activation_fp8.launch_twice, gated=False),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "quantize": lambda x_TX: x_TX,
    "silu_mul": ops_activation.silu_mul,
    "gelu": ops_activation.gelu,
}
OPS: dict[str, Callable[[Tensor], QuantizedActivation]] = {
    "quantize": ops_quantize.quantize_fp8_token,
    "silu_mul": lambda x_TX: ops_activation_fp8.silu_mul_fp8(x_TX, None, None),
    "gelu": lambda x_TX: ops_activation_fp8.gelu_fp8(x_TX, None, None),
}


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_none(counter_ptr: tl.tensor, PARTS: tl.constexpr) -> None:
    """Return at once: the interpreter runs one program after the other."""
    return


@pytest.fixture
def _in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(meeting, "wait_for_all", wait_for_none)


def _given(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    wide = 2 * width if name == "silu_mul" else width
    x_TX = torch.randn(tokens, wide, generator=torch.Generator().manual_seed(width))
    x_TX[1:2] = 0.0
    x_TX[2:3, -1] = 5e3  # the largest in the last part
    return x_TX.to(device, dtype)


@pytest.mark.usefixtures("_in_turns")
@pytest.mark.parametrize("part", meeting.PARTS)
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_row_has_the_bits_of_one_program_s(
    name: str, part: int, device: torch.device, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and scales, bounded or not, whatever the width; counters are zero afterwards.

    In the interpreter, where nobody waits, all parts are written down in a first launch and read in a second.
    """
    largest = Tensor()
    kept = meeting.largest_of_parts

    def remembered(*given: object) -> Tensor:
        nonlocal largest
        largest = largest if largest.numel() else kept(*given)  # type: ignore[arg-type]
        return largest

    for turn, width in enumerate(WIDTHS):
        for bound in (None, 0.75):
            x_TX = _given(name, 3, width, dtypes[turn % len(dtypes)], device)
            found, expected = empty_fp8(x_TX, width, None), empty_fp8(x_TX, width, None)
            largest = Tensor()
            for module in () if ON_GPU else (ops_activation_fp8, ops_quantize):
                monkeypatch.setattr(module, "largest_of_parts", remembered)
            with poisoned():
                for _ in range(2):
                    SHARED[name](found, x_TX, bound, part)  # type: ignore[operator]
            ALONE[name](expected, x_TX, bound)
            assert torch.equal(found.scale, expected.scale), (width, bound)
            assert torch.equal(found.values_TI.float(), expected.values_TI.float()), (width, bound)
            assert not counters(device, 1).any()


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
@pytest.mark.parametrize("part", meeting.PARTS)
@pytest.mark.parametrize("name", TWICE)
def test_two_launches_give_the_twin_s_bits(name: str, part: int, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Rows too wide for a program, odd ones too, bounded or not: of zeros, with the largest in the last part, with a NaN."""
    for turn, width in enumerate(WIDE):
        for tokens in (1, 3):
            x_TX = _given(name, tokens, width, dtypes[turn % len(dtypes)], device)
            x_TX[0, width // 2] = torch.nan if tokens > 1 else 9.0
            for bound in (None, 0.75):
                found = empty_fp8(x_TX, width, None)
                with poisoned():
                    TWICE[name](found, x_TX, bound, part)  # type: ignore[operator]
                _same(found, _expected(PLAIN[name](x_TX), bound), (width, tokens, bound))


@pytest.mark.parametrize("name", TWICE)
def test_two_launches_give_the_bits_of_one_program_s(name: str, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Whatever rounds; rows may lie apart, and one program's are computed in the same order of everything but the maximum."""
    for width in (2, 126, 6200, *WIDE[:2]):
        x_TX = _given(name, 3, width, dtypes[-1], device)
        apart_TX = torch.full((3, x_TX.shape[1] + 5), torch.nan, dtype=x_TX.dtype, device=device)[:, 3:-2].copy_(x_TX)
        for bound in (None, 0.75):
            found, expected = empty_fp8(x_TX, width, None), empty_fp8(x_TX, width, None)
            with poisoned():
                TWICE[name](found, apart_TX, bound, 2048)  # type: ignore[operator]
            ALONE[name](expected, x_TX, bound)
            _same(found, expected, (width, bound))


@pytest.mark.parametrize("name", TWICE)
def test_rows_too_wide_for_a_program_take_two_launches(
    name: str, device: torch.device, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are one feature narrower are taken by one program each."""
    module = ops_quantize if name == "quantize" else ops_activation_fp8
    took: list[str] = []
    monkeypatch.setattr(module, "launch_twice", lambda *_, **__: took.append("twice"))
    monkeypatch.setattr(module, "launch_rows", lambda *_, **__: took.append("alone"))
    monkeypatch.setattr(module, "part_of", lambda *_: None)
    for width in (meeting.MOST_ALONE, meeting.MOST_ALONE + 1):
        OPS[name](_given(name, 1, width, dtypes[0], device))
    assert took == ["alone", "twice"]


@pytest.mark.parametrize("name", SHARED)
def test_every_part_is_compiled_ahead(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step of some tokens compiles nothing: what any number of them takes was asked for, beside the step's own."""
    cuda, least = torch.device("cuda"), meeting.LEAST_ACTIVATION
    module, took = ops_quantize if name == "quantize" else ops_activation_fp8, list[object]()
    monkeypatch.setattr(meeting, "processors", lambda device: 132)
    assert meeting.parts_ahead(28672, cuda, least) == ()
    monkeypatch.setattr(meeting, "launches_nothing", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", False)
        assert meeting.parts_ahead(28672, cuda, least) == tuple(meeting.PARTS)
        assert meeting.parts_ahead(8192, cuda, least) == ()
    monkeypatch.setattr(module, "parts_ahead", lambda *_: (2048, 8192))
    monkeypatch.setattr(module, "part_of", lambda *_: None)
    monkeypatch.setattr(module, "launch_shared", lambda *given, **_: took.append(given[-1]))
    monkeypatch.setattr(module, "launch_rows", lambda *_, **__: took.append("alone"))
    OPS[name](_given(name, 1, 28672, torch.float32, device))
    assert took == [2048, 8192, "alone"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARED)
def test_a_graph_can_replay_rows_that_are_shared(name: str, device: torch.device) -> None:
    """One launch behind the other, each early, over and over: the bits stay those of one program a row."""
    for tokens in (1, 2, 8, 150):  # of the last no row is shared: the widest take two launches
        given = [_given(name, tokens, width, torch.bfloat16, device) for width in (14848, 28672, 59392)]
        OPS[name](given[0])
        torch.cuda.synchronize()
        graph, found = torch.cuda.CUDAGraph(), list[QuantizedActivation]()
        with torch.cuda.graph(graph):
            found += [OPS[name](x_TX) for _ in range(10) for x_TX in given]
        for _ in range(20):
            graph.replay()
        for number, each in enumerate(found):
            x_TX = given[number % len(given)]
            expected = empty_fp8(x_TX, each.values_TI.shape[1], None)
            ALONE[name](expected, x_TX, None)
            assert torch.equal(each.scale, expected.scale)
            assert torch.equal(each.values_TI.float(), expected.values_TI.float())
    assert not counters(device, 1).any()


def test_rows_are_shared_while_every_program_can_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens of wide rows, in the smallest parts that fit; the interpreter shares none, and narrow rows are not shared."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(meeting, "processors", lambda device: 132)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    least = meeting.LEAST_ACTIVATION
    chosen = {tokens: meeting.part_of(tokens, 28672, cuda, least) for tokens in (1, 9, 10, 33, 34, 4096)}
    assert chosen == {1: 2048, 9: 2048, 10: 8192, 33: 8192, 34: None, 4096: None}
    assert meeting.part_of(1, 8192, cuda, least) is None
    assert meeting.part_of(1, 14848, cuda, least) == 2048
    assert meeting.part_of(1, 14848, cuda, meeting.LEAST_QUANTISATION) is None
    for width in range(least, 60000, 1000):
        for tokens in range(1, 140):
            part = meeting.part_of(tokens, width, cuda, least)
            assert part is None or tokens * -(-width // part) <= 132
    assert meeting.part_of(1, 28672, torch.device("cpu"), least) is None
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert meeting.part_of(1, 28672, cuda, least) is None
