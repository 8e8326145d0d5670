"""The sizes each op is measured at: the widths of published models.

T tokens, R rows, V vocabulary, E model size, I, O input and output features, F feed-forward size, H query heads, K KV heads,
D head size, L positions, N pages, P tokens a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from paddock.bench.kernels.case import Case, Draw, Make
from paddock.bench.kernels.fp8_cases import GATED, PRODUCTS, Fp8Cases, Fp8Size
from paddock.bench.kernels.int4_cases import FALCON_180B as FALCON_180B_INT4
from paddock.bench.kernels.int4_cases import INT4_OPS, Int4Cases, Int4Size
from paddock.bench.kernels.int4_cases import LLAMA_70B as LLAMA_70B_INT4
from paddock.bench.kernels.int4_cases import QUICK as QUICK_INT4
from paddock.layers import LayerKV
from paddock.layers.reference import FP8
from paddock.planning.roofs import BF16, NO_TENSOR_CORES

_EPS, _ACTIVATION_SCALE = 1e-5, 0.01
_PAGE, _POSITIONS = 64, 8192
_FLOAT32_BYTES = 4
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P = 0.8, 50, 0.9, 0.02


@frozen(kw_only=True)
class Sizes:
    """A model's: embed, feed-forward, heads (H, K, D), linears (O, I), vocabulary."""

    name: str
    embed: int
    feed: int
    heads: tuple[int, int, int]
    linears: tuple[tuple[int, int], ...] = ()
    vocab: int = 128_256


LLAMA_8B = Sizes(
    name="8B",
    embed=4096,
    feed=14336,
    heads=(32, 8, 128),
    linears=((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128_256, 4096)),
)
LLAMA_70B = Sizes(
    name="70B",
    embed=8192,
    feed=28672,
    heads=(64, 8, 128),
    linears=((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (128_256, 8192)),
)
LLAMA_405B = Sizes(name="405B", embed=16384, feed=53248, heads=(128, 8, 128))
FALCON_180B = Sizes(name="Falcon-180B", embed=14848, feed=59392, heads=(232, 8, 64), vocab=65_024)
QUICK = Sizes(name="quick", embed=64, feed=96, heads=(4, 2, 16), linears=((96, 64),), vocab=512)


@frozen(kw_only=True)
class Table:
    """Which models, and how many tokens: of most ops, of linears, FP8 and 4-bit ones, and rows of those that choose tokens.

    `gated_tokens` are those of FP8 products that end in an activation.
    """

    models: tuple[Sizes, ...]
    tokens: tuple[int, ...]
    linear_tokens: tuple[int, ...]
    rows: tuple[int, ...]
    fp8_tokens: tuple[int, ...]
    gated_tokens: tuple[int, ...]
    int4: tuple[Int4Size, ...]
    int4_tokens: tuple[int, ...]


FULL = Table(
    models=(LLAMA_8B, LLAMA_70B, LLAMA_405B, FALCON_180B),
    tokens=(1, 64, 4096),
    linear_tokens=(1, 2, 4, 8, 16, 32, 64, 256),
    rows=(1, 64, 256),
    fp8_tokens=(1, 2, 4, 8, 16, 32, 64, 256, 4096),
    gated_tokens=(1, 16, 64),
    int4=(LLAMA_70B_INT4, FALCON_180B_INT4),
    int4_tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
)
SMALL = Table(
    models=(QUICK,),
    tokens=(1, 7),
    linear_tokens=(1, 7),
    rows=(1, 5),
    fp8_tokens=(1, 7, 65),
    gated_tokens=(1, 7, 65),
    int4=(QUICK_INT4,),
    int4_tokens=(1, 7, 65),
)


@frozen(eq=False, kw_only=True)
class OpCases:
    """Makes the cases of any op from a table."""

    table: Table
    draw: Draw

    def of(self, op: str) -> list[Case]:
        """Return the cases of an op, none for one the table says nothing about."""
        makers = {"linear": self._linear, "embed": self._embed, **dict.fromkeys(_SAMPLING_OPS, self._logits)}
        if op in makers:
            return list(makers[op](op))
        if op in INT4_OPS:
            return list(Int4Cases(sizes=self.table.int4, tokens=self.table.int4_tokens, draw=self.draw).of(op))
        if op in (*PRODUCTS, *GATED) or op.endswith(_FP8_SUFFIX):
            return self._fp8_cases.of(op)
        found = ((self._page_cases if op in _PAGE_OPS else self._row_cases)(op, model, t) for model, t in self._grid())
        return [case for cases in found for case in cases]

    @property
    def _fp8_cases(self) -> Fp8Cases:
        """Return what makes FP8's cases: all linears but the head, which formats leave plain."""
        sizes = tuple(
            Fp8Size(
                name=model.name,
                embed=model.embed,
                feed=model.feed,
                linears=tuple(s for s in model.linears if s[0] != model.vocab),
            )
            for model in self.table.models
        )
        return Fp8Cases(
            sizes=sizes,
            tokens=self.table.tokens,
            product_tokens=self.table.fp8_tokens,
            gated_tokens=self.table.gated_tokens,
            draw=self.draw,
        )

    def _grid(self) -> Iterator[tuple[Sizes, int]]:
        return ((model, tokens) for model in self.table.models for tokens in self.table.tokens)

    def _row_cases(self, op: str, model: Sizes, tokens: int) -> Iterator[Case]:
        """Yield the case of a norm, an activation or a quantisation."""
        if op in _ROW_OPS:
            inputs, fed, moved = _ROW_OPS[op]
            width = model.feed if fed else model.embed
            make = self._rows(op, tokens, width, inputs)
            yield self._case(f"{model.name} {tokens} x {width}", make, moved(self._item) * tokens * width)

    def _rows(self, op: str, tokens: int, width: int, inputs: int) -> Make:
        rest, wide = self._after_rows(op, width), 2 * width if op == "silu_mul" else width
        return lambda seed: (*(self.draw.normal(10 + 2 * seed + i, tokens, wide) for i in range(inputs)), *rest)

    def _after_rows(self, op: str, width: int) -> tuple[Any, ...]:
        """Return the arguments that follow the activations."""
        match op.removeprefix("add_"):
            case "rms_norm":
                return self.draw.normal(1, width), _EPS
            case "layer_norm":
                return self.draw.normal(1, width), self.draw.normal(2, width), _EPS
            case "quantize_fp8_static":
                return (torch.tensor(_ACTIVATION_SCALE, device=self.draw.device),)
            case "quantize_fp8_token":
                return (None,)
        return ()

    def _page_cases(self, op: str, model: Sizes, tokens: int) -> Iterator[Case]:
        num_heads, num_kv_heads, head_dim = model.heads
        for name, page_dtype in (("", self.draw.dtype), (", FP8 pages", FP8)):
            nbytes = 2 * (self._item + page_dtype.itemsize) * tokens * num_kv_heads * head_dim
            if op == "rope_and_cache":
                nbytes += 2 * self._item * tokens * num_heads * head_dim
            make = self._pages(op, tokens, model.heads, page_dtype)
            yield self._case(f"{model.name} {tokens} x ({num_heads}, {num_kv_heads}) x {head_dim}{name}", make, nbytes)

    def _pages(self, op: str, tokens: int, heads: tuple[int, int, int], page_dtype: torch.dtype) -> Make:
        num_heads, num_kv_heads, head_dim = heads
        draw = self.draw
        angle_LJ = torch.arange(_POSITIONS, device=draw.device)[:, None] * torch.logspace(
            0, -4, head_dim // 2, device=draw.device
        )
        table_LD = torch.cat((angle_LJ.cos(), angle_LJ.sin()), dim=-1)
        scales = tuple(torch.tensor(scale, device=draw.device) for scale in (0.011, 0.7))
        split = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)

        def make(seed: int) -> tuple[Any, ...]:
            qkv_TX = draw.normal(seed, tokens, sum(split))
            parts = torch.split_with_sizes(qkv_TX, split, dim=-1)  # views, as of a fused projection
            q_THD, k_TKD, v_TKD = (part.view(tokens, -1, head_dim) for part in parts)
            pages = tokens // _PAGE + 2
            kv = LayerKV(*(_empty_pages((pages, _PAGE, num_kv_heads, head_dim), page_dtype, draw.device) for _ in range(2)))
            slots_T = draw.order(seed, pages * _PAGE)[:tokens]
            if op == "cache_kv":
                return k_TKD, v_TKD, kv, slots_T, *scales
            positions_T = draw.whole(seed, 0, _POSITIONS, tokens)
            return q_THD, k_TKD, v_TKD, table_LD, positions_T, kv, slots_T, *scales

        return make

    def _linear(self, op: str) -> Iterator[Case]:
        for model in self.table.models:
            for (rows, columns), tokens in ((shape, t) for shape in model.linears for t in self.table.linear_tokens):
                make = self._product(rows, columns, tokens)
                nbytes = self._item * (rows * columns + tokens * (rows + columns))
                yield self._case(f"{model.name} {tokens} x {columns} -> {rows}", make, nbytes, 2.0 * tokens * rows * columns)

    def _product(self, rows: int, columns: int, tokens: int) -> Make:
        def make(seed: int) -> tuple[Any, ...]:
            return self.draw.normal(2 * seed, tokens, columns), self.draw.normal(2 * seed + 1, rows, columns)

        return make

    def _embed(self, op: str) -> Iterator[Case]:
        for model, tokens in self._grid():
            nbytes = tokens * (8 + 2 * self._item * model.embed)  # an id is 8 bytes; a row is read and written
            yield self._case(f"{model.name} {tokens} of {model.vocab} x {model.embed}", self._gather(model, tokens), nbytes)

    def _gather(self, model: Sizes, tokens: int) -> Make:
        table = cache(lambda: self.draw.normal(0, model.vocab, model.embed))  # one for all sets: no step reads much of it
        return lambda seed: (self.draw.whole(seed, 0, model.vocab, tokens), table())

    def _logits(self, op: str) -> Iterator[Case]:
        vocab = self.table.models[0].vocab
        for rows in self.table.rows:
            yield self._case(f"{rows} x {vocab}", self._choices(op, rows, vocab), _FLOAT32_BYTES * rows * vocab)

    def _choices(self, op: str, rows: int, vocab: int) -> Make:
        draw = self.draw
        temperature_R, top_k_R, top_p_R, min_p_R = (
            torch.full((rows,), value, device=draw.device) for value in (_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P)
        )
        filters = (top_k_R, top_p_R, min_p_R) if op == "draw_filtered" else ()

        def make(seed: int) -> tuple[Tensor, ...]:
            logits_RV = draw.normal(seed, rows, vocab).float()
            if op == "most_likely":
                return (logits_RV,)
            top_R, token_R = logits_RV.max(dim=-1)
            seed_R2 = draw.whole(seed, -(2**31), 2**31, rows, 2, dtype=torch.int32)
            position_R = draw.whole(seed, 0, _POSITIONS, rows, dtype=torch.int32)
            return logits_RV, top_R, token_R, temperature_R, *filters, seed_R2, position_R

        return make

    def _case(self, name: str, make: Make, nbytes: int, flops: float = 0.0) -> Case:
        kind = BF16 if self.draw.dtype.itemsize == 2 else NO_TENSOR_CORES
        return Case(name=name, make=make, nbytes=nbytes, flops=flops, kind=kind)

    @property
    def _item(self) -> int:
        return self.draw.dtype.itemsize


# Op: how many activations it takes, whether as wide as the feed-forward, bytes moved for each element of an item of those bytes.
_ROW_OPS: dict[str, tuple[int, bool, Callable[[int], int]]] = {
    "rms_norm": (1, False, lambda item: 2 * item),
    "layer_norm": (1, False, lambda item: 2 * item),
    "add_rms_norm": (2, False, lambda item: 4 * item),
    "add_layer_norm": (2, False, lambda item: 4 * item),
    "silu_mul": (1, True, lambda item: 3 * item),
    "gelu": (1, True, lambda item: 2 * item),
    "quantize_fp8_static": (1, False, lambda item: item + 1),
    "quantize_fp8_token": (1, False, lambda item: item + 1),
}
_FP8_SUFFIX = "_fp8"
_PAGE_OPS = ("rope_and_cache", "cache_kv")
_SAMPLING_OPS = ("most_likely", "draw", "draw_filtered")


def _empty_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device).to(dtype)
