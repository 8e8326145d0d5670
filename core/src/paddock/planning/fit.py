"""Whether it fits: the longest sequence, the pages, and, when it does not fit, by how much and what would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from attrs import evolve, frozen

from paddock.axes import Linear
from paddock.config import EngineConfig
from paddock.errors import PlanError
from paddock.planning.backends import Attention
from paddock.planning.formats import Format
from paddock.planning.hardware import GIB
from paddock.planning.int4_compute import Int4Compute
from paddock.planning.layout import Divisible, Layout, Sizes
from paddock.planning.ledger import Batch, Room, StageCost, graph_bytes, kv_bytes_per_token, largest_weight, ledgers, workspace
from paddock.planning.notes import ASKED, Notes
from paddock.planning.plan import Ledger, Rejected
from paddock.planning.weights import Weigher, copies_tied_heads

# An automatic length is not shortened below this (or the model's own length): where even that does not fit, nothing does.
SHORTEST_AUTOMATIC_LENGTH = 512
# What a GPU's driver and the allocator's rounding take is not ours to give away.
LARGEST_ADVISED_SHARE = 0.97
# A checkpoint in fewer bits is advised where its linears would take no more than this share of what they take now.
WORTH_FEWER_BITS = 0.6
_MORE_KV = {
    "cpu": "give the KV cache more memory with kv_cache_memory_bytes",
    "cuda": "use more GPUs, raise gpu_memory_utilization, keep KV in fewer bits with kv_cache_dtype",
}
_DEVICE_COUNTS = (2, 4, 8, 16)


@frozen(kw_only=True)
class Sized:
    """The model as it will run on a kind of `device`, ready to be weighed at any layout.

    `positions` is its own longest sequence, with its RoPE scaling.
    """

    device: str
    positions: int
    model: Divisible
    fmt: Format
    attention: Attention
    batch: Batch
    graphs: bool
    vocab_size: int
    int4: Int4Compute

    def costs(self, layout: Layout) -> tuple[StageCost, ...]:
        """Return what each stage costs one of its devices."""
        table, dtype, shard = self.model.table, self.fmt.dtype, layout.shard
        copies = copies_tied_heads(self.device, dtype)
        weigher = Weigher(
            table=table,
            tensors=self.model.tensors,
            dtype=dtype,
            shard=shard,
            copies_tied_heads=copies,
            row_scales=self.int4.weights_from is not None,
            fp8_copies=self.int4.keeps_weights,
        )
        needs, spec, kv_dtype = self.model.needs, self.attention.spec, self.attention.kv_cache_dtype
        space = workspace(
            table=table, shard=shard, dtype=dtype, vocab_size=self.vocab_size, attention=spec, needs=needs, batch=self.batch
        )
        if self.int4.makes_weights(self.batch.tokens):
            space = evolve(space, weights=largest_weight(table, shard))
        captured = partial(
            graph_bytes, table=table, shard=shard, dtype=dtype, vocab_size=self.vocab_size, max_num_seqs=self.batch.sequences
        )
        return tuple(
            StageCost(
                stage=stage,
                weights=weigher.weigh(stage),
                workspace=space if stage.is_last else evolve(space, logits=0),
                graph_bytes=captured(num_layers=stage.end - stage.first) if self.graphs else 0,
                kv_bytes_per_token=kv_bytes_per_token(needs, shard, stage.end - stage.first, kv_dtype),
                page_size=self.attention.page_size,
            )
            for stage in layout.stages
        )

    def layout(self, sizes: Sizes) -> Layout:
        """Return a layout of these sizes, without asking who would carry it out."""
        return Layout(sizes=sizes, shard=self.model.shard(sizes.tensor), stages=self.model.stages(sizes.pipeline))


def choose_length(config: EngineConfig, sized: Sized, layout: Layout, room: Room, notes: Notes) -> int:
    """Return the longest sequence: what was asked for, else the model's own length, shortened to what memory holds.

    Where not even `SHORTEST_AUTOMATIC_LENGTH` fits that is returned, so that what is missing is the least that would do.
    Raises PlanError, with both numbers, when more was asked for than the model has positions.
    """
    asked, limit = config.max_model_len, sized.positions
    if asked is not None:
        if asked > limit:
            raise PlanError(
                f"max_model_len is {asked}, but the model's positions end at {limit}",
                fix=f"lower max_model_len to {limit}, or scale the model's RoPE in config.json",
            )
        notes.choose("max_model_len", asked, ASKED)
        return asked
    held = room.longest(sized.costs(layout))
    longest = max(held, min(limit, SHORTEST_AUTOMATIC_LENGTH))
    if longest >= limit:
        notes.choose("max_model_len", limit, "the model's own length")
        return limit
    reason = "what the KV pages hold" if held == longest else "the shortest that is chosen unasked"
    notes.choose("max_model_len", longest, reason, [Rejected(str(limit), f"the pool holds {held} tokens")])
    if held < longest:
        return longest
    notes.find(
        "warning",
        "max_model_len_shortened",
        f"sequences end at {longest} tokens: the model takes {limit}, but no more fit the KV pages",
        f"{_MORE_KV[sized.device]}, or set max_model_len to say that this is enough",
    )
    return longest


def fit(sized: Sized, layout: Layout, room: Room, max_model_len: int, notes: Notes) -> tuple[Ledger, ...]:
    """Return the ledger of every stage; write down by how much something does not fit and what would."""
    costs = sized.costs(layout)
    result = ledgers(costs, room, max_model_len)
    _check_asked_pool(room, costs, notes)
    worst = max(result, key=lambda ledger: ledger.missing_bytes)
    if worst.missing_bytes:
        where = f"stage {worst.stage}" if len(result) > 1 else room.hardware.name
        notes.find(
            "error",
            "out_of_memory",
            f"{where} needs {_gib(worst.needed_bytes)} for weights, workspace and one sequence of {max_model_len} tokens, "
            f"of {_gib(worst.budget_bytes)} it may use: {_gib(worst.missing_bytes)} too little",
            "; ".join(ways_out(sized, layout, room, max_model_len)) or "use a smaller model",
        )
    elif worst.num_pages < worst.pages_per_sequence:
        needed = worst.pages_per_sequence * max(cost.page_bytes for cost in costs)
        holds = worst.num_pages * costs[0].page_size
        notes.find(
            "error",
            "pool_too_small",
            f"the KV pool of {worst.num_pages} pages holds {holds} tokens, one sequence of max_model_len {max_model_len} "
            f"needs {worst.pages_per_sequence} pages",
            f"give kv_cache_memory_bytes at least {needed}" + (f", or lower max_model_len to {holds}" if holds else ""),
        )
    return result


def _check_asked_pool(room: Room, costs: tuple[StageCost, ...], notes: Notes) -> None:
    left = min(room.budget_bytes - cost.fixed_bytes for cost in costs)
    if room.asked_kv_bytes is not None and 0 < left < room.asked_kv_bytes:
        notes.find(
            "error",
            "kv_cache_too_large",
            f"kv_cache_memory_bytes asks for {_gib(room.asked_kv_bytes)}, weights and workspace leave {_gib(left)}",
            f"lower kv_cache_memory_bytes to {left}, or raise gpu_memory_utilization",
        )


def ways_out(sized: Sized, layout: Layout, room: Room, max_model_len: int) -> Iterator[str]:
    """Yield what would make it fit: fewer tokens, a larger share of the memory, more devices, fewer bits."""
    costs, pages = sized.costs(layout), _pages(sized, max_model_len)
    longest = room.pages_that_fit(costs) * sized.attention.page_size
    if longest:
        yield f"lower max_model_len to {longest}"
    if sized.int4.keeps_weights and _fits(evolve(sized, int4=evolve(sized.int4, keeps_weights=False)), layout, room, pages):
        yield f"leave out keep_fp8_weights ({_gib(max(cost.weights.copies for cost in costs))})"
    needed = max(cost.fixed_bytes + pages * cost.page_bytes for cost in costs)
    share = math.ceil(100 * needed / room.hardware.memory_bytes) / 100
    if share <= LARGEST_ADVISED_SHARE and needed <= evolve(room, utilization=share).budget_bytes:
        yield f"raise gpu_memory_utilization to {share}"
    devices = _enough_devices(sized, layout, room, max_model_len)
    if devices is not None and room.hardware.device == "cuda":
        held = room.longest(sized.costs(sized.layout(devices)))
        yield f"use {devices.devices} GPUs ({devices}" + (f", sequences to {held} tokens)" if held < sized.positions else ")")
    rest = max(cost.fixed_bytes - cost.weights.total + pages * cost.page_bytes for cost in costs)
    half = max(cost.weights.total for cost in costs) // 2
    if sized.fmt.quantization is None and sized.fmt.dtype == "float32" and half + rest <= room.budget_bytes:
        yield f"use dtype bfloat16 ({_gib(half)} of weights)"
    now = _stored_bits(sized, layout, costs)
    for name, bits in (("an FP8", 8.0), ("an INT4", 4.25)):
        if bits <= WORTH_FEWER_BITS * now:
            size = max(int(cost.weights.total - cost.weights.layers * (1 - bits / now)) for cost in costs)
            if size + rest <= room.budget_bytes:
                yield f"use {name} checkpoint (about {_gib(size)} of weights each)"
                if bits == 8 and sized.fmt.could_be:
                    yield f"set quantization to {' or '.join(sized.fmt.could_be)}, which quantises this one while it is read"


def _pages(sized: Sized, max_model_len: int) -> int:
    return math.ceil(max_model_len / sized.attention.page_size)


def _enough_devices(sized: Sized, layout: Layout, room: Room, max_model_len: int) -> Sizes | None:
    pages = _pages(sized, max_model_len)
    for count in (n for n in _DEVICE_COUNTS if n > layout.sizes.devices):
        for tensor in (n for n in range(count, 0, -1) if count % n == 0):
            sizes = Sizes(tensor=tensor, pipeline=count // tensor)
            if sized.model.why_not(sizes):
                continue
            if _fits(sized, sized.layout(sizes), room, pages):
                return sizes
    return None


def _fits(sized: Sized, layout: Layout, room: Room, pages: int) -> bool:
    return all(cost.fixed_bytes + pages * cost.page_bytes <= room.budget_bytes for cost in sized.costs(layout))


def _stored_bits(sized: Sized, layout: Layout, costs: tuple[StageCost, ...]) -> float:
    """Return the bits in which a weight of the layers' linears is stored, scales and zero points included."""
    linears = (layout.shard.linear(module) for module in sized.model.table.layer if isinstance(module, Linear))
    held = sum(linear.out_size * linear.in_size for linear in linears) * sized.model.table.num_layers
    return 8 * sum(cost.weights.layers for cost in costs) / max(1, held)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
