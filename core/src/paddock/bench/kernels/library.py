"""What torch itself offers for the same work: its fused calls, and its quickest attention over keys side by side.

T tokens, S sequences, H query heads, K KV heads, D head size, L tokens of a sequence, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from attrs import frozen
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paddock.bench.kernels.attention_cases import Laid, rows_of
from paddock.bench.kernels.timing import Sets

Call = Callable[..., Any]


@frozen(eq=False, kw_only=True)
class Library:
    """A call of torch that does the same work, under the name it has there."""

    name: str
    call: Call


def scaled_mm(values_TI: Tensor, scale_T1: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return torch's FP8 product with a scale a row, of sums kept as exact as the matrix unit keeps them by itself."""
    return torch._scaled_mm(values_TI, weight_OI.T, scale_T1, weight_scale_O1.T, out_dtype=dtype, use_fast_accum=True)


OPS = {
    "embed": Library(name="F.embedding", call=nnf.embedding),
    "linear": Library(name="F.linear", call=nnf.linear),
    "linear_fp8": Library(name="_scaled_mm, fast", call=scaled_mm),
    "rms_norm": Library(name="F.rms_norm", call=lambda x, weight, eps: nnf.rms_norm(x, weight.shape, weight, eps)),
    "add_rms_norm": Library(
        name="add, F.rms_norm", call=lambda x, delta, weight, eps: nnf.rms_norm(x + delta, weight.shape, weight, eps)
    ),
    "layer_norm": Library(
        name="F.layer_norm", call=lambda x, weight, bias, eps: nnf.layer_norm(x, weight.shape, weight, bias, eps)
    ),
    "add_layer_norm": Library(
        name="add, F.layer_norm",
        call=lambda x, delta, weight, bias, eps: nnf.layer_norm(x + delta, weight.shape, weight, bias, eps),
    ),
    "silu_mul": Library(name="F.silu, mul", call=lambda x: nnf.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :]),
    "gelu": Library(name="F.gelu", call=nnf.gelu),
    "most_likely": Library(name="argmax", call=lambda logits: logits.argmax(dim=-1)),
}
ATTENTION_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def attention_calls(laid: Laid) -> Iterator[Library]:
    """Yield torch's fused attention by each of its backends, where the step is one it can take in one call.

    That is sequences of one length, all decoding or all prompts, KV in the queries' type; pages are laid side by side for it.
    """
    step = laid.step
    if laid.fp8_pages or len(set(step.lens)) > 1 or len({new == 1 for new in step.news}) > 1:
        return
    causal = bool(step.prompts)

    def attend(q_SHLD: Tensor, k_SKLD: Tensor, v_SKLD: Tensor) -> Tensor:
        return nnf.scaled_dot_product_attention(
            q_SHLD, k_SKLD, v_SKLD, is_causal=causal, scale=laid.params.scale, enable_gqa=step.heads[0] != step.heads[1]
        )

    for backend in ATTENTION_BACKENDS:
        yield Library(name=f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}", call=_only(backend, attend))


def side_by_side(laid: Laid, sets: Sets) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (q, K, V) of each set with a sequence's rows in order, for calls that know no pages."""
    return [
        (
            q_THD.view(len(laid.step.lens), -1, *q_THD.shape[1:]).transpose(1, 2),
            *(_stacked(laid, pages_NPKD) for pages_NPKD in (kv.k_pages_NPKD, kv.v_pages_NPKD)),
        )
        for q_THD, kv in sets
    ]


def _stacked(laid: Laid, pages_NPKD: Tensor) -> Tensor:
    rows = [rows_of(laid, pages_NPKD, s).transpose(0, 1) for s in range(len(laid.step.lens))]
    return torch.stack(rows).contiguous()


def _only(backend: SDPBackend, call: Call) -> Call:
    def called(*arguments: Any) -> Any:
        with sdpa_kernel(backend):
            return call(*arguments)

    return called
