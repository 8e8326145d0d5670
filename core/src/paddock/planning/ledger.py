"""The byte ledger: weights, KV pages, workspace and graphs of each pipeline stage, and how many tokens fit."""

from __future__ import annotations

import math

from attrs import frozen

from paddock.axes import KV_HEADS, Embedding, Linear, Part, Shard, WeightTable
from paddock.planning.hardware import GIB, KIB, Hardware
from paddock.planning.padding import CHUNK_COUNTS, LARGEST_CHUNKS, MIXED_GRAPHS, padded_sizes
from paddock.planning.plan import Ledger, WeightBytes, Workspace
from paddock.planning.weights import Stage, dtype_bytes
from paddock.plugins.descriptors import AttentionNeeds, AttentionSpec, resolve

# A CPU's pages share memory with everything else on the machine: unless asked otherwise, no more than this, nor than half
# of what weights and workspace leave.
CPU_KV_BYTES = 4 * GIB
# Bytes a row of logits needs while a token is sampled: float32 logits, sorted values, int64 order, probabilities, running sum.
SAMPLING_BYTES_PER_LOGIT = 4 + 4 + 8 + 4 + 4
# What a captured step of one shape keeps for each layer, beside its buffers: batches of 1, 2, 4, ... 256 of Llama-3.1-8B took
# 325 MB of an H100, of which by arithmetic 232 MB are the buffers of the largest. Other sizes met on the way are not told apart.
GRAPH_BYTES_PER_LAYER = 320 * KIB


@frozen(kw_only=True)
class Batch:
    """The largest step: `tokens` computed, `sequences` sampled."""

    tokens: int
    sequences: int


@frozen(kw_only=True)
class StageCost:
    """What one device of a stage must hold before any page, and what a token and a page of KV take there."""

    stage: Stage
    weights: WeightBytes
    workspace: Workspace
    graph_bytes: int
    kv_bytes_per_token: int
    page_size: int

    @property
    def fixed_bytes(self) -> int:
        """Return everything but KV."""
        return self.weights.total + self.workspace.total + self.graph_bytes

    @property
    def page_bytes(self) -> int:
        """Return the bytes of one page over the stage's layers."""
        return self.kv_bytes_per_token * self.page_size


def budget_bytes(hardware: Hardware, utilization: float) -> int:
    """Return what the engine may use of one device: its share of the memory, and never more than is free.

    On a CPU it is also its share of what is free: the rest of the machine, and Python itself, live in what remains.
    """
    free = hardware.available_bytes if hardware.device == "cuda" else int(hardware.available_bytes * utilization)
    return min(int(hardware.memory_bytes * utilization), free)


def kv_bytes_per_token(needs: AttentionNeeds, shard: Shard, num_layers: int, dtype: str) -> int:
    """Return the bytes of K and V of one token on one device: 2 x layers x its KV heads x head size x element."""
    heads = shard.part(Part("kv", KV_HEADS, needs.num_kv_heads, needs.head_dim))
    return 2 * num_layers * heads.size * dtype_bytes(dtype)


def activation_bytes_per_token(table: WeightTable, shard: Shard, dtype: str) -> int:
    """Return an estimate of what one token takes at the widest point of a layer.

    A gated MLP holds gate and up while it writes their product; alive beside them are the other block's widest output (q, k and
    v), the residual stream before and after the last sum, what was added to it, a norm's output, and what is added next. For
    Llama-3.1-8B that is 139,264 bytes; a step of 8,192 tokens took 139,310 a token on an H100.
    """
    width = max((module.width.size for module in table.outer if isinstance(module, Embedding)), default=0)
    linears = [shard.linear(module) for module in table.layer if isinstance(module, Linear)]
    outputs = sorted((linear.out_size for linear in linears), reverse=True)
    widest = sum(outputs[:2]) + max((linear.in_size for linear in linears), default=0)
    return (5 * width + widest) * dtype_bytes(dtype)


def largest_weight(table: WeightTable, shard: Shard) -> int:
    """Return the most weights that a linear of a layer has on one device: a byte each, in FP8."""
    linears = [shard.linear(module) for module in table.layer if isinstance(module, Linear)]
    return max((linear.out_size * linear.in_size for linear in linears), default=0)


def workspace(
    *,
    table: WeightTable,
    shard: Shard,
    dtype: str,
    vocab_size: int,
    attention: AttentionSpec,
    needs: AttentionNeeds,
    batch: Batch,
) -> Workspace:
    """Return an estimate of what the largest step needs beside weights and KV."""
    attention_bytes = resolve(attention.workspace)(needs, batch.tokens, batch.sequences) if attention.workspace else 0
    return Workspace(
        activations=batch.tokens * activation_bytes_per_token(table, shard, dtype),
        logits=min(batch.tokens, batch.sequences) * vocab_size * SAMPLING_BYTES_PER_LOGIT,
        attention=int(attention_bytes),
    )


def graph_bytes(*, table: WeightTable, shard: Shard, dtype: str, vocab_size: int, max_num_seqs: int, num_layers: int) -> int:
    """Return an estimate of what captured decode steps keep: the graphs of every size, and buffers for the largest."""
    graphs = (len(padded_sizes(max_num_seqs)) + MIXED_GRAPHS) * num_layers * GRAPH_BYTES_PER_LAYER
    return graphs + small_step_bytes(table=table, shard=shard, dtype=dtype, vocab_size=vocab_size, sequences=max_num_seqs)


def small_step_bytes(*, table: WeightTable, shard: Shard, dtype: str, vocab_size: int, sequences: int) -> int:
    """Return an estimate of what the largest padded step allocates: a layer's tensors, or logits of every row.

    Logits are there as the head gives them and in float32, beside what is left of the last layer's.
    """
    a_token = activation_bytes_per_token(table, shard, dtype)
    logits = (sequences + CHUNK_COUNTS[-1]) * (dtype_bytes(dtype) + 4) * vocab_size
    return sequences * a_token + max(LARGEST_CHUNKS * a_token, logits)


@frozen(kw_only=True)
class Room:
    """The memory of every device and what the user asked of it; decides how many pages there are."""

    hardware: Hardware
    utilization: float
    asked_kv_bytes: int | None
    max_num_seqs: int

    @property
    def budget_bytes(self) -> int:
        """Return what one device may use."""
        return budget_bytes(self.hardware, self.utilization)

    def pages_that_fit(self, costs: tuple[StageCost, ...]) -> int:
        """Return the pages every stage has room for; an asked size of the pool bounds them too."""
        rooms = (self._kv_room(cost) // cost.page_bytes for cost in costs)
        return max(0, min(rooms))

    def num_pages(self, costs: tuple[StageCost, ...], max_model_len: int) -> int:
        """Return the pages of the pool.

        A GPU's pool takes all that is left, for prefix caching uses what sequences do not. A CPU's pool is no larger than
        `CPU_KV_BYTES` or half the room unless one sequence needs more, nor than all sequences at full length.
        """
        fit = self.pages_that_fit(costs)
        if self.asked_kv_bytes is not None or self.hardware.device != "cpu":
            return fit
        one = math.ceil(max_model_len / costs[0].page_size)
        return min(fit, max(one, min(self._polite_pages(costs), one * self.max_num_seqs)))

    def longest(self, costs: tuple[StageCost, ...]) -> int:
        """Return the longest sequence an automatic length may choose: what the pool holds, and on a CPU holds politely."""
        fit = self.pages_that_fit(costs)
        if self.asked_kv_bytes is None and self.hardware.device == "cpu":
            fit = min(fit, self._polite_pages(costs))
        return fit * costs[0].page_size

    def _kv_room(self, cost: StageCost) -> int:
        room = self.budget_bytes - cost.fixed_bytes
        return room if self.asked_kv_bytes is None else min(room, self.asked_kv_bytes)

    def _polite_pages(self, costs: tuple[StageCost, ...]) -> int:
        return max(0, min(min(CPU_KV_BYTES, self._kv_room(cost) // 2) // cost.page_bytes for cost in costs))


def ledgers(costs: tuple[StageCost, ...], room: Room, max_model_len: int) -> tuple[Ledger, ...]:
    """Return each stage's ledger; the pool has the same pages on every device, those of the stage with the least room."""
    pages = room.num_pages(costs, max_model_len)
    return tuple(
        Ledger(
            stage=cost.stage.index,
            first_layer=cost.stage.first,
            end_layer=cost.stage.end,
            budget_bytes=room.budget_bytes,
            weights=cost.weights,
            workspace=cost.workspace,
            graph_bytes=cost.graph_bytes,
            kv_bytes_per_token=cost.kv_bytes_per_token,
            page_bytes=cost.page_bytes,
            num_pages=pages,
            pages_per_sequence=math.ceil(max_model_len / cost.page_size),
        )
        for cost in costs
    )
