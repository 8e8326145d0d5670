"""What an attention backend and an implementation of an op must hold to, over odd shapes.

T tokens, L keys, H query heads, K KV heads, D head size, N pages, P tokens a page, E features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock.layers import HEADS_APART, TWO_DELTAS, AttentionBackend, AttentionInputs, AttentionParams, LayerKV
from paddock.layers import reference as twins
from paddock.layers.fp8_attention import attend_in_fp8
from paddock.layers.op_marks import side_by_side, taken
from paddock.plugins import AttentionNeeds
from paddock.testing.oracle import ODD_SIZES, assert_close, dense_attention, poisoned
from paddock.testing.paging import Pages

HEADS = ((1, 1, 32), (4, 4, 16), (9, 3, 64), (8, 1, 64), (8, 2, 128))  # (H, K, D)
# Each case is a batch of (tokens already there, tokens of this step).
BATCHES = (
    ((0, 1),),
    ((0, 7),),
    ((15, 1), (16, 1), (17, 1), (0, 1)),
    ((122, 1), (3, 1), (62, 1)),
    ((0, 16), (0, 17), (0, 1)),
    ((63, 1), (7, 1), (16, 31), (0, 63), (5, 123)),
    ((300, 270),),
)
_WIDENED = (torch.bfloat16, torch.float16)


@frozen(eq=False, kw_only=True)
class AttentionCase:
    """One step of attention: random queries, keys and values, in pages that lie scattered and whose other rows are NaN.

    `chunks` says of each sequence how many tokens are new. `attention_case` makes one.
    """

    needs: AttentionNeeds
    pages: Pages
    kv: LayerKV
    q_THD: Tensor
    inputs: AttentionInputs
    chunks: list[tuple[str, int]]

    def params(self, *features: str, window: int = 9) -> AttentionParams:
        """Return parameters with these features, and with scales where the pages are FP8."""
        device, fp8 = self.q_THD.device, self.kv.k_pages_NPKD.dtype == twins.FP8
        slopes_H = torch.linspace(0.5, 0.01, self.needs.num_heads, device=device)
        return AttentionParams(
            scale=self.needs.head_dim**-0.5,
            alibi_slopes_H=slopes_H if "alibi" in features else None,
            window=window if "sliding_window" in features else None,
            softcap=2.0 if "softcap" in features else None,
            k_scale=torch.tensor(0.5, device=device) if fp8 else None,
            v_scale=torch.tensor(1.5, device=device) if fp8 else None,
        )

    def attend(self, backend: AttentionBackend, params: AttentionParams) -> Tensor:
        """Return what the backend gives [T, H, D], in memory that was NaN."""
        inputs = evolve(self.inputs, prepared=backend.prepare(self.inputs))
        with poisoned():
            return backend.attend(self.q_THD, self.kv, inputs, params)

    def check(self, out_THD: Tensor, params: AttentionParams, at: str = "") -> None:
        """Hold every sequence's output to float64, each by itself: a long one must not hide a short one."""
        start = 0
        for name, count in self.chunks:
            part = slice(start, start + count)
            start += count
            if params.in_fp8:
                self._check_in_fp8(out_THD[part], self.q_THD[part], params, name, at)
                continue
            k_LKD, v_LKD = (
                self.pages.rows(name, pages_NPKD).double() * (1.0 if scale is None else scale.double())
                for pages_NPKD, scale in ((self.kv.k_pages_NPKD, params.k_scale), (self.kv.v_pages_NPKD, params.v_scale))
            )
            expected = dense_attention(
                self.q_THD[part], k_LKD, v_LKD, scale=params.scale, slopes_H=params.alibi_slopes_H, window=params.window,
                softcap=params.softcap,
            )  # fmt: skip
            assert_close(out_THD[part], expected, op="attention", at=f"{at} sequence {name}: {count} new of {len(k_LKD)}")

    def _check_in_fp8(self, out_QHD: Tensor, q_QHD: Tensor, params: AttentionParams, name: str, at: str) -> None:
        """Hold a sequence's output in FP8 arithmetic to its definition."""
        k_LKD, v_LKD = (self.pages.rows(name, pages) for pages in (self.kv.k_pages_NPKD, self.kv.v_pages_NPKD))
        expected = attend_in_fp8(q_QHD.float(), k_LKD, v_LKD, params)
        dtype = torch.bfloat16 if out_QHD.is_cuda else None
        at = f"{at} sequence {name}: {len(q_QHD)} new of {len(k_LKD)}"
        assert_close(out_QHD, expected, op="attention_fp8", dtype=dtype, at=at)


def attention_case(
    batch: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    page_size: int = 64,
    kv_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionCase:
    """Return a step of sequences with (tokens already there, tokens of this step), single tokens first.

    `heads` is (H, K, D); pages are of `kv_dtype` where it is given, else of the queries' type.
    """
    device = torch.device(device)
    num_heads, num_kv_heads, head_dim = heads
    pages = Pages(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=sum((there + new) // page_size + 1 for there, new in batch) + 3,
        dtype=kv_dtype or dtype,
        device=device,
        seed=seed,
    )
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    (kv,), chunks = pages.layers, [(str(i), new) for i, (_, new) in enumerate(batch)]
    before = pages.inputs([(str(i), there) for i, (there, _) in enumerate(batch) if there])
    inputs = pages.inputs(chunks)
    for slots_T in (before.slots_T, inputs.slots_T):
        k_TKD, v_TKD = (normal(len(slots_T), num_kv_heads, head_dim) for _ in range(2))
        twins.cache_kv(k_TKD, v_TKD, kv, slots_T, None, None)
    q_THD = normal(len(inputs.slots_T), num_heads, head_dim)
    needs = AttentionNeeds(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return AttentionCase(needs=needs, pages=pages, kv=kv, q_THD=q_THD, inputs=inputs, chunks=chunks)


@frozen(eq=False, kw_only=True)
class Comparison:
    """A tensor found and the one expected: `what` it is, and the `row` of the table of bounds it falls under."""

    row: str
    what: str
    actual: Tensor
    expected: Tensor


def comparisons(op: str, twin: Callable[..., Any], given: Sequence[Any], found: Any) -> Iterator[Comparison]:
    """Yield what an op that writes no pages returned beside what its twin makes of the same arguments in float32.

    A sum is rounded before its norm is taken, so that the norm expected is that of the sum that was found.
    """
    wide = widened(given)
    if op.startswith("add_"):
        (sum_TE, h_TE), (x_TE, delta_TE, *rest) = found, wide
        yield Comparison(row="add", what="the sum", actual=sum_TE, expected=x_TE + delta_TE)
        norm_TE = twin(sum_TE.float(), torch.zeros_like(delta_TE), *rest)[1]
        yield Comparison(row=op.removeprefix("add_"), what="its norm", actual=h_TE, expected=norm_TE)
        return
    expected = twin(*wide)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else ((found, expected),)
    for actual, wanted in pairs:
        yield Comparison(row=op, what="the result", actual=actual, expected=wanted)


def page_comparisons(op: str, found: Any, kv: LayerKV, expected: Any, expected_kv: LayerKV) -> Iterator[Comparison]:
    """Yield what `rope_and_cache` or `cache_kv` returned and all pages after it, the rows beside the slots included."""
    if op == "rope_and_cache":
        yield Comparison(row=op, what="q", actual=found, expected=expected)
    for half, row in (("k_pages_NPKD", op), ("v_pages_NPKD", "cache_kv")):
        yield Comparison(row=row, what=half, actual=getattr(kv, half), expected=getattr(expected_kv, half))


def widened(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Return the arguments in float32, pages too, and a dtype to return as float32; FP8 and integers as they are."""
    return tuple(map(_wide, arguments))


def check_attention(
    create: Callable[[AttentionNeeds, torch.device], AttentionBackend],
    *,
    device: torch.device | str = "cpu",
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    page_sizes: Iterable[int] = (16, 64),
    features: Iterable[str] = (),
    fp8_pages: bool = False,
    heads: Iterable[tuple[int, int, int]] = HEADS,
) -> None:
    """Check a backend against dense float64 attention: every batch, dtype, page size, head shape and named feature.

    Pages lie scattered and full of NaN: a row read beyond a sequence's end, or an output element nobody writes, is seen.
    """
    features = tuple(features)
    for shape in heads:
        needs = AttentionNeeds(num_heads=shape[0], num_kv_heads=shape[1], head_dim=shape[2], features=frozenset(features))
        backend = create(needs, torch.device(device))
        for dtype, page_size, (seed, batch) in itertools.product(dtypes, page_sizes, enumerate(BATCHES)):
            kv_dtype = twins.FP8 if fp8_pages else dtype
            case = attention_case(batch, shape, dtype=dtype, page_size=page_size, kv_dtype=kv_dtype, device=device, seed=seed)
            for feature in ("", *features):
                params = case.params(feature)
                at = f"{batch} H{shape[0]} K{shape[1]} D{shape[2]} P{page_size} {feature}"
                case.check(case.attend(backend, params), params, at)


def check_op(
    name: str,
    implementation: Callable[..., Any],
    *,
    device: torch.device | str = "cpu",
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
) -> None:
    """Check an implementation of an op from rows to rows against its plain-torch twin, run in float32.

    `check_cache_op` is for the ops that write pages.
    """
    for dtype in dtypes:
        for tokens in (0, *ODD_SIZES):
            for features in (2, 14, 126, 576):
                given, at = _arguments(name, tokens, features, dtype, torch.device(device)), f"T{tokens} E{features}"
                with poisoned():
                    found = implementation(*given)
                _check_rows(name, given, found, dtype, at)
                if TWO_DELTAS in taken(implementation):
                    x_TE, delta_TE, *rest = given
                    more_TE = delta_TE.flip(-1)
                    with poisoned():
                        found = implementation(*given, more_TE=more_TE)
                    _check_rows(name, (x_TE, delta_TE + more_TE, *rest), found, dtype, f"{at}, two deltas")


def _check_rows(name: str, given: tuple[Any, ...], found: Any, dtype: torch.dtype, at: str) -> None:
    for each in comparisons(name, getattr(twins, name), given, found):
        assert each.actual.dtype == dtype, f"{name} turned {dtype} into {each.actual.dtype}"
        assert_close(each.actual, each.expected, op=each.row, dtype=dtype, at=f"{each.what} {at}")


def check_cache_op(
    name: str,
    implementation: Callable[..., Any],
    *,
    device: torch.device | str = "cpu",
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    heads: Iterable[tuple[int, int, int]] = HEADS,
) -> None:
    """Check an implementation of `rope_and_cache` or `cache_kv` against its plain-torch twin, run in float32.

    What it returns, what lies in the slots afterwards, and that every other row of the pages is as it was (NaN). One marked
    `HEADS_APART` is also given views of a fused projection in groups, of each KV head its queries, its key and its value.
    """
    heads, device = tuple(heads), torch.device(device)
    layouts = (False, True) if HEADS_APART in taken(implementation) else (False,)
    for dtype, tokens in itertools.product(dtypes, (0, *ODD_SIZES)):
        for shape in heads:
            for apart in layouts:
                found, found_kv = _cached(name, implementation, tokens, shape, dtype, device, apart=apart)
                twin, twin_kv = _cached(name, getattr(twins, name), tokens, shape, dtype, device, apart=apart, wide=True)
                at = f"T{tokens} H{shape[0]} K{shape[1]} D{shape[2]}{', in groups' if apart else ''}"
                for each in page_comparisons(name, found, found_kv, twin, twin_kv):
                    actual, expected = each.actual, each.expected
                    assert torch.equal(actual.isnan(), expected.isnan()), (
                        f"{name} {at}: other rows of {each.what} than the slots changed"
                    )
                    assert_close(actual.nan_to_num(), expected.nan_to_num(), op=each.row, dtype=dtype, at=f"{each.what} {at}")


def _cached(
    name: str,
    implementation: Callable[..., Any],
    tokens: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    apart: bool,
    wide: bool = False,
) -> tuple[Any, LayerKV]:
    """Return what an op gives for random tokens of `dtype`, and its pages; `wide`: computed and kept in float32.

    `apart`: heads are views of groups, each of a KV head's queries, its key and its value; or, where `wide`, copies of those.
    """
    num_heads, num_kv_heads, head_dim = shape
    generator, kept = torch.Generator().manual_seed(tokens), torch.float32 if wide else dtype

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).to(device=device, dtype=kept)

    pages = tokens // 16 + 2
    kv = LayerKV(*(torch.full((pages, 16, num_kv_heads, head_dim), torch.nan, dtype=kept, device=device) for _ in range(2)))
    if apart:
        groups_TKXD = normal(tokens, num_kv_heads, num_heads // num_kv_heads + 2, head_dim)
        q, k_TKD, v_TKD = groups_TKXD[:, :, :-2], groups_TKXD[:, :, -2], groups_TKXD[:, :, -1]
        if wide:
            q, k_TKD, v_TKD = side_by_side(q), side_by_side(k_TKD), side_by_side(v_TKD)
    else:
        q, k_TKD, v_TKD = (normal(tokens, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads))
    slots_T = torch.randperm(pages * 16, generator=generator)[:tokens].to(device)
    if name == "cache_kv":
        return implementation(k_TKD, v_TKD, kv, slots_T, None, None), kv
    positions_T = torch.randint(0, 300, (tokens,), generator=generator).to(device)
    angle_LJ = torch.arange(300)[:, None] * torch.rand(head_dim // 2, generator=generator)
    cos_sin_LD = torch.cat((angle_LJ.cos(), angle_LJ.sin()), dim=-1).to(device)
    with poisoned():
        return implementation(q, k_TKD, v_TKD, cos_sin_LD, positions_T, kv, slots_T, None, None), kv


def _wide(value: Any) -> Any:
    if isinstance(value, LayerKV):
        return LayerKV(_wide(value.k_pages_NPKD), _wide(value.v_pages_NPKD))
    if isinstance(value, torch.dtype) and value in _WIDENED:  # of what an op is to return
        return torch.float32
    return value.float() if isinstance(value, Tensor) and value.dtype in _WIDENED else value


def _arguments(name: str, tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(tokens * 1000 + features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    x_TE, weight_E, bias_E = normal(tokens, features), normal(features), normal(features)
    ids_T = torch.randint(0, 50, (tokens,), generator=generator).to(device)
    return {
        "embed": (ids_T, normal(50, features)),
        "linear": (x_TE, normal(3 * features // 2 + 1, features) * features**-0.5),
        "rms_norm": (x_TE, weight_E, 1e-5),
        "add_rms_norm": (x_TE, normal(tokens, features), weight_E, 1e-5),
        "layer_norm": (x_TE, weight_E, bias_E, 1e-5),
        "add_layer_norm": (x_TE, normal(tokens, features), weight_E, bias_E, 1e-5),
        "silu_mul": (x_TE,),
        "gelu": (x_TE,),
    }[name]
