"""Steps as a server has them: long contexts, prompts in chunks, decodes beside prefills, features together, replayed graphs.

T tokens, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve

pytest.importorskip("triton")

from paddock.layers import reference
from paddock_triton.attention import create
from paddock_triton.ops_quantize import quantize_fp8_static

ON_GPU = torch.cuda.is_available()
LONG = 131072 if ON_GPU else 600
FEATURES = ((), ("alibi",), ("sliding_window",), ("softcap",), ("sliding_window", "softcap"), ("alibi", "softcap"))
# (tokens already there, tokens of this step): decodes at page edges, empty and odd contexts; then chunks at tile and page edges.
MIXED = [(62, 1), (63, 1), (64, 1), (0, 1), (1023, 1), (0, 64), (1, 63), (64, 65), (500, 2), (0, 129), (127, 1000)]
if not ON_GPU:
    MIXED = [(63, 1), (64, 1), (0, 1), (0, 16), (15, 33)]
GROUPS = [(8, 2, 128), (29, 1, 64), (71, 1, 64), (6, 2, 256), (5, 5, 80), (12, 4, 96), (3, 1, 48)] if ON_GPU else [(6, 2, 16)]
RATIOS = range(1, 30) if ON_GPU else (1, 5, 17)


def _page_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return dtype, reference.FP8


def _in_turn(dtypes: Sequence[torch.dtype], turn: int) -> Sequence[torch.dtype]:
    """Return one of the dtypes, as it is their turn, where each is two kernels to compile; all of them in the interpreter."""
    return _one_in_turn(dtypes, turn) if ON_GPU else dtypes


def _one_in_turn(dtypes: Sequence[torch.dtype], turn: int) -> Sequence[torch.dtype]:
    return dtypes[turn % len(dtypes) :][:1]


def _interpreted_in_turn(dtypes: Sequence[torch.dtype], turn: int) -> Sequence[torch.dtype]:
    """Return one of the dtypes, as it is their turn, where they are interpreted; all of them on a GPU."""
    return dtypes if ON_GPU else _one_in_turn(dtypes, turn)


@pytest.mark.parametrize("ratio", RATIOS)
def test_any_ratio_of_query_to_kv_heads_is_served(ratio: int, halves: list[torch.dtype], case: Callable[..., Any]) -> None:
    """From MHA to GQA of 29, FP8 or not in turn: rows of a tile that belong to no head change nothing."""
    head = 64 if ON_GPU else 16
    for dtype in halves[-1:]:
        for kv_dtype in _one_in_turn(_page_dtypes(dtype), ratio if ON_GPU else RATIOS.index(ratio)):
            step = case([(70, 1), (0, 1), (5, 13), (0, 67)], (2 * ratio, 2, head), dtype=dtype, kv_dtype=kv_dtype)
            params = step.params()
            step.check(step.attend(create(step.needs, step.q_THD.device), params), params, str(kv_dtype))


@pytest.mark.parametrize("fp8_pages", [False, True])
@pytest.mark.parametrize("lengths", [(3, 64), (LONG, 5)], ids=["whole", "in pieces"])
def test_decodes_emit_the_fp8_that_a_quantisation_would_make(
    lengths: tuple[int, int], fp8_pages: bool, halves: list[torch.dtype], case: Callable[..., Any]
) -> None:
    """One kernel gives the bits of two, a sequence's keys split or not; a step with a prompt in it is quantised after."""
    for dtype in halves:
        step = case([(n, 1) for n in lengths], (6, 2, 16), dtype=dtype, kv_dtype=reference.FP8 if fp8_pages else dtype)
        backend, params = create(step.needs, step.q_THD.device), step.params()
        scale = torch.tensor(0.004, device=step.q_THD.device)
        found = step.attend(backend, evolve(params, out_scale=scale))
        expected = quantize_fp8_static(step.attend(backend, params).flatten(1), scale)
        assert found.dtype == reference.FP8
        assert torch.equal(found.flatten(1).float(), expected.values_TI.float())
        assert len(set(expected.values_TI.float().flatten().tolist())) > 20
    mixed = case([(3, 1), (0, 5)], (6, 2, 16), dtype=halves[0])
    params = evolve(mixed.params(), out_scale=scale)
    mixed.check(mixed.attend(create(mixed.needs, mixed.q_THD.device), params), params)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids="+".join)
def test_decodes_and_prefills_of_one_step_are_both_right(
    features: tuple[str, ...], heads: tuple[int, int, int], halves: list[torch.dtype], case: Callable[..., Any]
) -> None:
    """Every sequence of a mixed step is held to dense attention by itself, with features alone and together, FP8 or not."""
    for dtype in _in_turn(halves, FEATURES.index(features) + GROUPS.index(heads)):
        for kv_dtype in _page_dtypes(dtype):
            step = case(MIXED, heads, dtype=dtype, kv_dtype=kv_dtype)
            params = step.params(*features, window=100)
            step.check(step.attend(create(step.needs, step.q_THD.device), params), params, str(kv_dtype))


@pytest.mark.parametrize("features", FEATURES[:3], ids="+".join)
@pytest.mark.parametrize("page_size", [16, 64])
def test_chunks_and_decodes_reach_back_over_a_long_context(
    page_size: int, features: tuple[str, ...], halves: list[torch.dtype], case: Callable[..., Any]
) -> None:
    """A chunk of a prompt of 131,072 tokens, its last ones and its first, and decodes that long, in one step."""
    for dtype in halves[-1:]:
        for kv_dtype in _interpreted_in_turn(_page_dtypes(dtype), FEATURES.index(features) + page_size // 64):
            batch = [(LONG - 1, 1), (3, 1), (LONG - 37, 37), (LONG // 2, 130 if ON_GPU else 20), (0, 70)]
            step = case(batch, (4, 1, 64 if ON_GPU else 16), dtype=dtype, page_size=page_size, kv_dtype=kv_dtype)
            params = step.params(*features, window=LONG // 32)
            step.check(step.attend(create(step.needs, step.q_THD.device), params), params, str(kv_dtype))


@pytest.mark.parametrize("heads", [(232, 8, 64), (64, 8, 128), (71, 1, 64)] if ON_GPU else [(29, 1, 16)], ids=str)
def test_published_heads_in_a_batch_of_many(
    heads: tuple[int, int, int], halves: list[torch.dtype], case: Callable[..., Any]
) -> None:
    """Falcon 180B, Llama 70B and Falcon 7B, one sequence to a length from 1 to 300."""
    lens = range(0, 300, 7) if ON_GPU else (0, 17)
    for kv_dtype in _page_dtypes(halves[-1]):
        step = case([(there, 1) for there in lens] + [(3, 5)], heads, dtype=halves[-1], kv_dtype=kv_dtype)
        params = step.params()
        step.check(step.attend(create(step.needs, step.q_THD.device), params), params, str(kv_dtype))


def test_the_same_step_gives_the_same_bits(halves: list[torch.dtype], case: Callable[..., Any]) -> None:
    """Which program comes last to join the pieces changes nothing."""
    step = case([(LONG // 8, 1), (100, 1), (0, 40)], (8, 2, 64 if ON_GPU else 16), dtype=halves[-1])
    backend, params = create(step.needs, step.q_THD.device), step.params()
    first = step.attend(backend, params)
    for _ in range(20 if ON_GPU else 1):
        assert torch.equal(step.attend(backend, params), first)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, reference.FP8], ids=str)
@pytest.mark.parametrize("features", [(), ("alibi",), ("sliding_window",)], ids="+".join)
def test_a_captured_step_follows_what_its_inputs_become(
    features: tuple[str, ...], kv_dtype: torch.dtype, case: Callable[..., Any]
) -> None:
    """A graph of decodes, captured once, is replayed over other queries, lengths and pages, its output poisoned in between."""
    heads, count, longest = (8, 2, 64), 5, 2048
    steps = [
        case([(there - 1, 1) for there in lens], heads, dtype=torch.bfloat16, kv_dtype=kv_dtype)
        for lens in ([longest] * count, [1] * count, [1, longest, 64, 65, 700], [2000, 1, 1, 129, 33])
    ]
    held, *others = steps
    backend, params = create(held.needs, held.q_THD.device), held.params(*features, window=100)
    held.attend(backend, params)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = held.attend(backend, params)
    for step in others:
        _become(held, step)
        out_THD.zero_()
        graph.replay()
        step.check(out_THD, params, "replayed")


@pytest.mark.memcheck
@pytest.mark.parametrize("heads", [(8, 2, 128), (29, 1, 64), (6, 2, 256), (3, 1, 48)] if ON_GPU else [(3, 1, 16)], ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
def test_small_steps_stay_within_their_tensors(
    page_size: int, heads: tuple[int, int, int], halves: list[torch.dtype], case: Callable[..., Any]
) -> None:
    """What memcheck looks at: every tile shape, pages of both kinds, pieces that are joined, nothing large."""
    for turn, kv_dtype in enumerate(_page_dtypes(halves[-1]), page_size // 64):
        step = case(
            [(699, 1), (0, 1), (16, 1), (0, 5), (63, 66)], heads, dtype=halves[-1], page_size=page_size, kv_dtype=kv_dtype
        )
        backend = create(step.needs, step.q_THD.device)
        for features in FEATURES[:3] if ON_GPU else FEATURES[:3][turn % 2 :: 2]:
            params = step.params(*features, window=100)
            step.check(step.attend(backend, params), params, str(kv_dtype))


def _become(held: Any, step: Any) -> None:
    """Copy a step's queries, lengths, tables and pages into the tensors that a graph was captured with."""
    held.q_THD.copy_(step.q_THD)
    held.inputs.seq_lens_S.copy_(step.inputs.seq_lens_S)
    width = step.inputs.block_tables_SM.shape[1]
    held.inputs.block_tables_SM.zero_()
    held.inputs.block_tables_SM[:, :width].copy_(step.inputs.block_tables_SM)
    for mine, theirs in ((held.kv.k_pages_NPKD, step.kv.k_pages_NPKD), (held.kv.v_pages_NPKD, step.kv.v_pages_NPKD)):
        mine.view(torch.uint8)[: len(theirs)].copy_(theirs.view(torch.uint8))
