"""Lengths live on the device: long ones, uneven ones, and ones that change under a captured graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attrs import evolve

from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.plugins import AttentionNeeds
from paddock.testing.oracle import assert_close, dense_attention

PAGE = 64
ON_GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")


def _inputs(lens: list[int], max_seq_len: int, device: torch.device) -> AttentionInputs:
    """Return decodes of sequences with these lengths, their pages shuffled; page 0 is nobody's."""
    generator = torch.Generator().manual_seed(sum(lens))
    width = -(-max_seq_len // PAGE)
    order = torch.randperm(len(lens) * width, generator=generator, dtype=torch.int32) + 1
    starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=device)
    return AttentionInputs(
        positions_T=starts[:-1].long(),
        slots_T=starts[:-1].long(),
        query_start_S1=starts,
        seq_lens_S=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables_SM=order.view(len(lens), width).to(device),
        page_size=PAGE,
        num_decodes=len(lens),
        max_query_len=1,
        max_seq_len=max_seq_len,
    )


def _kv(inputs: AttentionInputs, num_kv_heads: int, head: int, dtype: torch.dtype) -> LayerKV:
    shape = (inputs.block_tables_SM.numel() + 1, PAGE, num_kv_heads, head)
    device = inputs.block_tables_SM.device
    return LayerKV(*(torch.randn(shape, device=device).to(dtype) for _ in range(2)))


def _check(out_THD: torch.Tensor, q_THD: torch.Tensor, kv: LayerKV, inputs: AttentionInputs, at: str) -> None:
    for s, length in enumerate(inputs.seq_lens_S.tolist()):
        rows = [x[inputs.block_tables_SM[s].long()].flatten(0, 1)[:length] for x in (kv.k_pages_NPKD, kv.v_pages_NPKD)]
        expected = dense_attention(q_THD[s : s + 1], *rows, scale=q_THD.shape[2] ** -0.5)
        assert_close(out_THD[s : s + 1], expected, op="attention", at=f"{at} sequence {s} of {length}")


@pytest.mark.parametrize("lens", [[131072] if ON_GPU else [1500], [1, 700, 64, 65, 3]], ids=str)
def test_uneven_and_long_sequences_are_split_and_joined(lens: list[int], dtypes: list[torch.dtype], device: torch.device) -> None:
    """However many pieces a sequence is cut into, it gives what the whole gives."""
    from paddock_triton.attention import create

    torch.manual_seed(0)
    inputs = _inputs(lens, max(lens), device)
    backend = create(AttentionNeeds(num_heads=8, num_kv_heads=2, head_dim=64), device)
    for dtype in dtypes[1:]:
        kv = _kv(inputs, 2, 64, dtype)
        q_THD = torch.randn(len(lens), 8, 64, device=device).to(dtype)
        prepared = evolve(inputs, prepared=backend.prepare(inputs))
        for _ in range(2):  # the second finds the counters as the first left them
            _check(backend.attend(q_THD, kv, prepared, AttentionParams(scale=0.125)), q_THD, kv, inputs, str(dtype))


def test_a_decode_of_few_tiles_stays_whole_and_a_longer_one_is_cut(device: torch.device) -> None:
    """To join pieces takes longer than four tiles do one after the other; what is cut has pieces of three at least."""
    from paddock_triton.attention_schedule import decode_units

    units = decode_units(_inputs([256, 257, 1, 1000], 1000, device), window=None, wanted=60, tile=64, heads=2)
    live = [row[:6] for row in units.units_U8.tolist() if row[0] >= 0]
    assert [row[:4] for row in live[:4]] == [[0, 0, 256, 1], [1, 0, 192, 2], [1, 192, 257, 2], [2, 0, 1, 1]]
    assert [row[1:3] for row in live[4:]] == [[at, min(at + 192, 1000)] for at in range(0, 1000, 192)]
    assert {tuple(row[3:]) for row in live[4:]} == {(6, 4, 1000)}


def test_a_chunk_without_tokens_is_nobodys_work(device: torch.device) -> None:
    """Its tile would read a page beyond the sequence's last; the others' tiles are what they are without it."""
    from paddock_triton.attention_schedule import prefill_units

    inputs = _inputs([64, 70, 128], 128, device)
    starts = torch.tensor([0, 0, 33, 33], dtype=torch.int32, device=device)
    units = prefill_units(evolve(inputs, query_start_S1=starts, num_decodes=0), num_tokens=33, group=2, tile=16)
    live = [row[:3] for row in units.units_U8.tolist() if row[0] >= 0]
    assert live == [[1, 64, 66], [1, 48, 64], [1, 32, 48], [1, 16, 32], [1, 0, 16]]


def test_a_prefill_of_very_many_tiles_is_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """65,536 tokens of 71 query heads are 72,704 tiles: a grid holds 65,535 in its second and third dimension."""
    from paddock_triton import attention_prefill
    from paddock_triton.attention_schedule import UNIT, Units
    from paddock_triton.attention_tuning import prefill_tile

    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(attention_prefill, "_prefill", Kernel())
    inputs, (num_heads, num_kv_heads, head) = _inputs([1], 1, device), (142, 2, 16)
    kv, q_THD = _kv(inputs, num_kv_heads, head, torch.float16), torch.zeros(1, num_heads, head, device=device).half()
    units = Units(torch.zeros(72_704, UNIT.value, dtype=torch.int32, device=device), torch.zeros(0, device=device))
    attention_prefill.prefill(q_THD, q_THD, kv, inputs, units, AttentionParams(scale=1.0), prefill_tile(q_THD, kv))
    assert [math.prod(grid) for grid in grids] == [72_704 * num_kv_heads]
    assert max(grids[0][1:], default=0) <= 65_535


@gpu
@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths(device: torch.device) -> None:
    """A graph captured for the longest context gives, after lengths, pages and queries changed, what they ask for."""
    from paddock_triton.attention import create

    torch.manual_seed(0)
    backend = create(AttentionNeeds(num_heads=8, num_kv_heads=2, head_dim=64), device)
    inputs, longest = _inputs([1, 1, 1, 1], 4096, device), 4096
    kv = _kv(inputs, 2, 64, torch.bfloat16)
    q_THD = torch.randn(4, 8, 64, device=device).bfloat16()

    def run() -> torch.Tensor:
        prepared = evolve(inputs, prepared=backend.prepare(inputs))
        return backend.attend(q_THD, kv, prepared, AttentionParams(scale=0.125))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = run()
    for lens in ([1, 1, 1, 1], [longest, 5, 64, 1000], [17, 2048, 65, longest]):
        changed = _inputs(lens, longest, device)
        inputs.seq_lens_S.copy_(changed.seq_lens_S)
        inputs.block_tables_SM.copy_(changed.block_tables_SM)
        q_THD.copy_(torch.randn(4, 8, 64, device=device))
        graph.replay()
        _check(out_THD, q_THD, kv, inputs, str(lens))


@gpu
@pytest.mark.gpu
def test_steps_of_other_sizes_compile_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel compiled amid serving would hold every sequence up: the sizes of a step are no part of a kernel."""
    import triton

    from paddock_triton.attention import create

    backend = create(AttentionNeeds(num_heads=8, num_kv_heads=2, head_dim=64), device)
    kv = _kv(_inputs([4096] * 33, 4096, device), 2, 64, torch.bfloat16)

    def run(decodes: int, chunk: int, longest: int) -> None:
        inputs = _inputs([longest] * (decodes + 1), longest, device)
        starts = torch.arange(decodes + 2, dtype=torch.int32, device=device)
        starts[-1] += chunk - 1
        inputs = evolve(inputs, query_start_S1=starts, num_decodes=decodes, max_query_len=chunk)
        q_THD = torch.randn(decodes + chunk, 8, 64, device=device).bfloat16()
        prepared = evolve(inputs, prepared=backend.prepare(inputs))
        backend.attend(q_THD, kv, prepared, AttentionParams(scale=0.125))

    run(17, 33, 700)
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts["repr"]))
    for decodes, chunk, longest in ((32, 64, 4096), (31, 1000, 1024), (17, 2, 65), (20, 16, 2048)):
        run(decodes, chunk, longest)
    assert not compiled
