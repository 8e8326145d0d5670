"""KV pages for tests: scattered, full of NaN until written, and just enough of a runner to step a model through them.

T tokens, S sequences, N pages, P tokens a page, K KV heads, D head size, M pages a sequence, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from paddock.layers import AttentionBackend, AttentionInputs, LayerKV, Model

Chunk = tuple[str, Sequence[int]]  # a sequence's name and its next tokens


class Pages:
    """Pages of every layer and who holds them. Pages are handed out in a random order, so that no sequence's lie side by side."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = 16,
        num_pages: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Allocate pages full of NaN."""
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        self.layers = [LayerKV(_nan(shape, dtype, device), _nan(shape, dtype, device)) for _ in range(num_layers)]
        self.page_size, self.device = page_size, torch.device(device)
        self._free = random.Random(seed).sample(range(num_pages), num_pages)
        self._tables: dict[str, list[int]] = {}
        self._lens: dict[str, int] = {}

    def inputs(self, chunks: Sequence[tuple[str, int]]) -> AttentionInputs:
        """Return the inputs of a step that adds that many tokens to each named sequence; single tokens must come first."""
        counts = [count for _, count in chunks]
        num_decodes = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        positions: list[int] = []
        slots: list[int] = []
        tables: list[list[int]] = []
        for name, count in chunks:
            start = self._lens.get(name, 0)
            table = self._grow(name, start + count)
            positions += range(start, start + count)
            slots += [table[t // self.page_size] * self.page_size + t % self.page_size for t in range(start, start + count)]
            tables.append(table)
        widest = max(map(len, tables), default=0)
        lens = [self._lens[name] for name, _ in chunks]
        return AttentionInputs(
            positions_T=self._tensor(positions, torch.int64),
            slots_T=self._tensor(slots, torch.int64),
            query_start_S1=self._tensor([sum(counts[:i]) for i in range(len(counts) + 1)], torch.int32),
            seq_lens_S=self._tensor(lens, torch.int32),
            block_tables_SM=self._tensor([[*t, *[0] * (widest - len(t))] for t in tables], torch.int32).view(len(chunks), widest),
            page_size=self.page_size,
            num_decodes=num_decodes,
            max_query_len=max(counts, default=0),
            max_seq_len=max(lens, default=0),
        )

    def rows(self, name: str, pages_NPKD: Tensor) -> Tensor:
        """Return what the pages hold of a sequence [L, K, D]."""
        return pages_NPKD[self._tables[name]].flatten(0, 1)[: self._lens[name]]

    def _grow(self, name: str, length: int) -> list[int]:
        table = self._tables.setdefault(name, [])
        while len(table) * self.page_size < length:
            table.append(self._free.pop())
        self._lens[name] = length
        return table

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@torch.inference_mode()
def step(model: Model, pages: Pages, backend: AttentionBackend, chunks: Sequence[Chunk]) -> list[Tensor]:
    """Return the logits [tokens of the chunk, V] after feeding each sequence its next tokens, all in one batch."""
    inputs = pages.inputs([(name, len(tokens)) for name, tokens in chunks])
    inputs = evolve(inputs, prepared=backend.prepare(inputs))
    token_ids_T = torch.tensor([t for _, tokens in chunks for t in tokens], dtype=torch.int64, device=pages.device)
    logits_TV = model.logits(model.forward(model.embed(token_ids_T), inputs, pages.layers))
    return list(torch.split_with_sizes(logits_TV, [len(tokens) for _, tokens in chunks]))


def _nan(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)
    return torch.full(shape, torch.nan, dtype=dtype, device=device)
