"""The byte ledger of the made-up model: what its parts take, on one device and on several."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from core.tests.planning.made import ParallelPlugin, cpu, gpus, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.planning.hardware import GIB
from paddock.planning.layout import cut_layers
from paddock.planning.ledger import CPU_KV_BYTES

EMBEDDING = 96 * 64 * 2
# qkv 64 x 64 + 2 x 32 x 64 with biases 128; o 64 x 64; up and down 128 x 64 each; all bf16.
LAYER = (64 * 64 + 2 * 32 * 64 + 128 + 64 * 64 + 2 * 128 * 64) * 2
NORMS = 5 * 2 * 64 * 2
KV_PER_TOKEN = 2 * 4 * 2 * 16 * 2


def test_weights_are_counted_by_kind() -> None:
    """Embeddings, layers with their biases, head and norms add up to the model."""
    weights = planned().ledger.weights
    assert (weights.embeddings, weights.layers, weights.head, weights.norms) == (EMBEDDING, 4 * LAYER, EMBEDDING, NORMS)
    assert weights.total == 2 * EMBEDDING + 4 * LAYER + NORMS


def test_a_tied_head_takes_nothing_beside_its_embedding() -> None:
    """On one device the head multiplies with the embedding's table."""
    assert planned({"tied": True}).ledger.weights.head == 0


def test_a_tied_head_on_the_last_stage_is_a_copy() -> None:
    """The last pipeline stage does not hold the embedding, so its head takes the table's bytes."""
    plan = planned({"tied": True}, gpus(2), plugins=[ParallelPlugin()], pipeline_parallel_size=2, tensor_parallel_size=1)
    assert [ledger.weights.embeddings for ledger in plan.ledgers] == [EMBEDDING, 0]
    assert [ledger.weights.head for ledger in plan.ledgers] == [0, EMBEDDING]


def test_a_tied_head_on_a_cpu_is_a_copy() -> None:
    """A CPU multiplies with a copy of the table in its kernels' layout, in the dtypes that have one."""
    heads = {
        dtype: planned({"tied": True}, cpu(), dtype=dtype).ledger.weights.head for dtype in ("bfloat16", "float32", "float16")
    }
    assert heads == {"bfloat16": EMBEDDING, "float32": 2 * EMBEDDING, "float16": 0}


def test_packed_weights_count_words_and_scales() -> None:
    """INT4 in words of eight, with a float16 scale for 32 inputs, is counted tensor by tensor."""
    stored = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 128 * 64
    plan = planned({"quantization_config": {"quant_method": "grouped"}})
    assert plan.ledger.weights.layers == 4 * (stored // 2 + stored // 32 * 2 + 128 * 2)


def test_ranks_share_what_is_cut_and_repeat_what_is_not() -> None:
    """With four ranks two KV heads are held twice, everything cut is a quarter, norms are whole."""
    plan = planned({}, gpus(4), plugins=[ParallelPlugin()], tensor_parallel_size=4)
    qkv = (16 * 64 + 2 * 16 * 64 + 48) * 2
    others = (64 * 16 + 2 * 32 * 64) * 2
    assert plan.ledger.weights.layers == 4 * (qkv + others)
    assert plan.ledger.weights.norms == NORMS
    assert plan.ledger.weights.embeddings == EMBEDDING // 4
    assert plan.ledger.kv_bytes_per_token == KV_PER_TOKEN // 2


def test_stages_share_the_layers_and_have_the_same_pages() -> None:
    """Each stage has its own layers' KV; the pool has as many pages everywhere as the fullest stage holds."""
    plan = planned({}, gpus(2), plugins=[ParallelPlugin()], tensor_parallel_size=1, pipeline_parallel_size=2)
    first, last = plan.ledgers
    assert plan.stages == ((0, 2), (2, 4))
    assert first.kv_bytes_per_token == last.kv_bytes_per_token == KV_PER_TOKEN // 2
    assert first.num_pages == last.num_pages == plan.num_pages
    assert plan.weight_bytes == planned().weight_bytes


def test_nothing_is_left_out_of_the_budget() -> None:
    """Weights, workspace, graphs, pages and what is free add up to what may be used; a page more would not fit."""
    ledger = planned({}, gpus(gib=40)).ledger
    assert ledger.fixed_bytes + ledger.kv_bytes + ledger.free_bytes == ledger.budget_bytes == int(40 * GIB * 0.92)
    assert ledger.free_bytes < ledger.page_bytes


def test_a_gpu_in_use_has_what_is_free() -> None:
    """What another process holds is not in the budget."""
    busy = evolve(gpus(gib=40), available_bytes=10 * GIB)
    assert planned({}, busy).ledger.budget_bytes == 10 * GIB


def test_the_backend_says_its_workspace() -> None:
    """The attention backend's own function counts its bytes."""
    assert planned(max_num_seqs=8).ledger.workspace.attention == 8000
    assert planned(attention_backend="torch").ledger.workspace.attention == 0


def test_logits_come_when_a_layers_tensors_are_gone() -> None:
    """The workspace is the larger of the two, with what attention needs beside the layers."""
    space = planned(max_num_seqs=8).ledger.workspace
    assert space.total == max(space.activations + space.attention, space.logits) < space.activations + space.logits


def test_graphs_take_memory_only_where_they_are_captured() -> None:
    """Eager mode, a backend that cannot be captured, and a CPU have none."""
    assert planned().ledger.graph_bytes > 0
    assert planned(enforce_eager=True).ledger.graph_bytes == 0
    assert planned(attention_backend="torch").ledger.graph_bytes == 0
    assert planned({}, cpu()).ledger.graph_bytes == 0


def test_a_cpu_pool_is_polite() -> None:
    """A CPU's pool is neither more than its bound nor more than all sequences at full length."""
    assert planned({"positions": 1 << 20}, cpu(gib=64), max_num_seqs=256).ledger.kv_bytes <= CPU_KV_BYTES
    small = planned({}, cpu(gib=64), max_num_seqs=2)
    assert small.kv_tokens == 2 * small.max_model_len


def test_a_small_cpu_keeps_half_of_what_is_left() -> None:
    """Where memory is short the pool takes half of the room beside weights and workspace, and shares are of what is free."""
    plan = planned({"positions": 1 << 24}, evolve(cpu(gib=8), available_bytes=2 * GIB))
    ledger = plan.ledger
    assert ledger.budget_bytes == int(2 * GIB * 0.92)
    assert 0 <= ledger.free_bytes - ledger.kv_bytes <= 2 * ledger.page_bytes
    assert plan.max_model_len == plan.kv_tokens
    assert [issue.code for issue in plan.issues] == ["max_model_len_shortened"]


def test_a_cpu_pool_grows_for_one_sequence_that_was_asked_for() -> None:
    """Politeness ends where one sequence of the asked length would not fit."""
    plan = planned({"positions": 1 << 26, "dtype": "float32"}, cpu(gib=128), max_model_len=1 << 24, dtype="float32")
    assert plan.ledger.kv_bytes == 2 * KV_PER_TOKEN << 24 > CPU_KV_BYTES
    assert not plan.errors


def test_an_asked_pool_is_what_was_asked() -> None:
    """kv_cache_memory_bytes sizes the pool exactly, rounded down to pages."""
    plan = planned(kv_cache_memory_bytes=1_000_000)
    assert plan.ledger.kv_bytes == 1_000_000 // plan.ledger.page_bytes * plan.ledger.page_bytes


@settings(deadline=None)
@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    data=st.data(),
)
def test_layers_are_cut_so_that_the_costliest_stage_is_the_cheapest_possible(costs: Any, data: Any) -> None:
    """No other way to cut into runs, none empty, has a smaller largest run."""
    from itertools import combinations

    stages = data.draw(st.integers(1, len(costs)))
    ends = cut_layers(costs, stages)
    starts = [0, *ends[:-1]]
    assert ends[-1] == len(costs)
    assert all(start < end for start, end in zip(starts, ends, strict=True))

    def largest(cuts: Any) -> Any:
        return max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))

    best = min(largest(cuts) for cuts in combinations(range(1, len(costs)), stages - 1))
    assert max(sum(costs[a:b]) for a, b in zip(starts, ends, strict=True)) == best


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_equal_layers_are_spread_evenly(stages: int) -> None:
    """Stages of equal layers differ by one at most."""
    ends = cut_layers([1.0] * 10, stages)
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert max(sizes) - min(sizes) <= 1
