"""What an attention backend and an implementation of an op must hold to, over odd shapes.

T tokens, L keys, H query heads, K KV heads, D head size, N pages, P tokens a page, E features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock.layers import AttentionBackend, AttentionParams, LayerKV
from paddock.layers import reference as twins
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


@frozen(eq=False, kw_only=True)
class _Case:
    """Random queries, keys and values of a batch, in pages whose unused rows are NaN."""

    pages: Pages
    kv: LayerKV
    q_THD: Tensor
    chunks: list[tuple[str, int]]
    inputs: Any


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
    device, features = torch.device(device), tuple(features)
    for num_heads, num_kv_heads, head_dim in heads:
        needs = AttentionNeeds(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, features=frozenset(features))
        backend = create(needs, device)
        for dtype in dtypes:
            for page_size in page_sizes:
                for seed, batch in enumerate(BATCHES):
                    case = _case(needs, batch, dtype, page_size, device, seed, fp8_pages=fp8_pages)
                    for feature in ("", *features):
                        params = _params(needs, device, feature, fp8_pages=fp8_pages)
                        at = f"{batch} H{num_heads} K{num_kv_heads} D{head_dim} P{page_size} {feature}"
                        _check_case(backend, case, params, at)


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
                given = _arguments(name, tokens, features, dtype, torch.device(device))
                with poisoned():
                    found = implementation(*given)
                for op, actual, expected in _expected(name, given, found):
                    assert actual.dtype == dtype, f"{name} turned {dtype} into {actual.dtype}"
                    assert_close(actual, expected, op=op, dtype=dtype, at=f"T{tokens} E{features}")


def check_cache_op(
    name: str,
    implementation: Callable[..., Any],
    *,
    device: torch.device | str = "cpu",
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    heads: Iterable[tuple[int, int, int]] = HEADS,
) -> None:
    """Check an implementation of `rope_and_cache` or `cache_kv` against its plain-torch twin, run in float32.

    What it returns, what lies in the slots afterwards, and that every other row of the pages is as it was (NaN).
    """
    heads = tuple(heads)
    for dtype in dtypes:
        for tokens in (0, *ODD_SIZES):
            for shape in heads:
                found, found_kv = _cached(name, implementation, tokens, shape, dtype, torch.device(device))
                twin, twin_kv = _cached(name, getattr(twins, name), tokens, shape, dtype, torch.device(device), wide=True)
                at = f"T{tokens} H{shape[0]} K{shape[1]} D{shape[2]}"
                if name == "rope_and_cache":
                    assert_close(found, twin, op=name, dtype=dtype, at=f"q {at}")
                for half, op in (("k_pages_NPKD", name), ("v_pages_NPKD", "cache_kv")):
                    pages, twin_pages = getattr(found_kv, half), getattr(twin_kv, half)
                    assert torch.equal(pages.isnan(), twin_pages.isnan()), (
                        f"{name} {at}: other rows of {half} than the slots changed"
                    )
                    assert_close(pages.nan_to_num(), twin_pages.nan_to_num(), op=op, dtype=dtype, at=f"{half} {at}")


def _cached(
    name: str,
    implementation: Callable[..., Any],
    tokens: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    wide: bool = False,
) -> tuple[Any, LayerKV]:
    """Return what an op gives for random tokens of `dtype`, and its pages; `wide`: computed and kept in float32."""
    num_heads, num_kv_heads, head_dim = shape
    generator, kept = torch.Generator().manual_seed(tokens), torch.float32 if wide else dtype

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).to(device=device, dtype=kept)

    pages = tokens // 16 + 2
    kv = LayerKV(*(torch.full((pages, 16, num_kv_heads, head_dim), torch.nan, dtype=kept, device=device) for _ in range(2)))
    k_TKD, v_TKD = normal(tokens, num_kv_heads, head_dim), normal(tokens, num_kv_heads, head_dim)
    slots_T = torch.randperm(pages * 16, generator=generator)[:tokens].to(device)
    if name == "cache_kv":
        return implementation(k_TKD, v_TKD, kv, slots_T, None, None), kv
    positions_T = torch.randint(0, 300, (tokens,), generator=generator).to(device)
    angle_LJ = torch.arange(300)[:, None] * torch.rand(head_dim // 2, generator=generator)
    cos_sin_LD = torch.cat((angle_LJ.cos(), angle_LJ.sin()), dim=-1).to(device)
    q_THD = normal(tokens, num_heads, head_dim)
    with poisoned():
        return implementation(q_THD, k_TKD, v_TKD, cos_sin_LD, positions_T, kv, slots_T, None, None), kv


def _expected(name: str, given: tuple[Any, ...], found: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (row of the bounds table, tensor found, what its twin gives in float32); a norm is that of the sum found."""
    if name.startswith("add_"):
        sum_TE, h_TE = found
        x_TE, delta_TE, *rest = given
        yield "add", sum_TE, x_TE.float() + delta_TE.float()
        yield from _expected(name.removeprefix("add_"), (sum_TE, *rest), h_TE)
    else:
        wide = (x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
        yield name, found, getattr(twins, name)(*wide)


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


def _case(
    needs: AttentionNeeds,
    batch: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    page_size: int,
    device: torch.device,
    seed: int,
    *,
    fp8_pages: bool,
) -> _Case:
    generator = torch.Generator().manual_seed(seed)
    pages = Pages(
        num_layers=1,
        num_kv_heads=needs.num_kv_heads,
        head_dim=needs.head_dim,
        page_size=page_size,
        num_pages=sum((there + new) // page_size + 1 for there, new in batch) + 3,
        dtype=torch.float8_e4m3fn if fp8_pages else dtype,
        device=device,
        seed=seed,
    )
    (kv,), chunks = pages.layers, [(str(i), new) for i, (_, new) in enumerate(batch)]
    before = [(str(i), there) for i, (there, _) in enumerate(batch) if there]
    _write(pages.inputs(before).slots_T, kv, needs, dtype, generator)
    inputs = pages.inputs(chunks)
    _write(inputs.slots_T, kv, needs, dtype, generator)
    q_THD = torch.randn(len(inputs.slots_T), needs.num_heads, needs.head_dim, generator=generator).to(device, dtype)
    return _Case(pages=pages, kv=kv, q_THD=q_THD, chunks=chunks, inputs=inputs)


def _write(slots_T: Tensor, kv: LayerKV, needs: AttentionNeeds, dtype: torch.dtype, generator: torch.Generator) -> None:
    shape = (len(slots_T), needs.num_kv_heads, needs.head_dim)
    k_TKD, v_TKD = (torch.randn(shape, generator=generator).to(slots_T.device, dtype) for _ in range(2))
    twins.cache_kv(k_TKD, v_TKD, kv, slots_T, None, None)


def _params(needs: AttentionNeeds, device: torch.device, feature: str, *, fp8_pages: bool) -> AttentionParams:
    slopes_H = torch.linspace(0.5, 0.01, needs.num_heads, device=device)
    return AttentionParams(
        scale=needs.head_dim**-0.5,
        alibi_slopes_H=slopes_H if feature == "alibi" else None,
        window=9 if feature == "sliding_window" else None,
        softcap=2.0 if feature == "softcap" else None,
        k_scale=torch.tensor(0.5, device=device) if fp8_pages else None,
        v_scale=torch.tensor(1.5, device=device) if fp8_pages else None,
    )


def _check_case(backend: AttentionBackend, case: _Case, params: AttentionParams, at: str) -> None:
    inputs = evolve(case.inputs, prepared=backend.prepare(case.inputs))
    with poisoned():
        out_THD = backend.attend(case.q_THD, case.kv, inputs, params)
    expected, start = [], 0
    for name, count in case.chunks:
        k_LKD, v_LKD = (
            case.pages.rows(name, pages_NPKD).double() * (1.0 if scale is None else scale.double())
            for pages_NPKD, scale in ((case.kv.k_pages_NPKD, params.k_scale), (case.kv.v_pages_NPKD, params.v_scale))
        )
        q_QHD = case.q_THD[start : start + count]
        start += count
        expected.append(
            dense_attention(
                q_QHD,
                k_LKD,
                v_LKD,
                scale=params.scale,
                slopes_H=params.alibi_slopes_H,
                window=params.window,
                softcap=params.softcap,
            )
        )
    assert_close(out_THD, torch.cat(expected), op="attention", at=at)
