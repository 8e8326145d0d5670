"""What torch itself offers for the same work: its fused calls, and its quickest attention over keys side by side.

T tokens, I, O input and output features, G groups, S sequences, H query heads, K KV heads, D head size, L tokens of a sequence,
R rows, V vocabulary.
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
from paddock.layers import int4
from paddock.layers.int4 import Int4Weight

Call = Callable[..., Any]


@frozen(eq=False, kw_only=True)
class Library:
    """A call of torch that does the same work, under the name it has there.

    `prepare` makes its arguments of the op's, once and untimed, and raises RuntimeError where there are none.
    """

    name: str
    call: Call
    prepare: Call | None = None

    def sets(self, sets: Sets) -> Sets:
        """Return the sets of arguments it is called with."""
        return sets if self.prepare is None else [self.prepare(*arguments) for arguments in sets]


def scaled_mm(values_TI: Tensor, scale_T1: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return torch's FP8 product with a scale a row, of sums kept as exact as the matrix unit keeps them by itself."""
    return torch._scaled_mm(values_TI, weight_OI.T, scale_T1, weight_scale_O1.T, out_dtype=dtype, use_fast_accum=True)


def int4_arguments(x_TI: Tensor, weight: Int4Weight) -> tuple[Tensor, Tensor, int, Tensor]:
    """Return what torch's product with 4-bit weights takes: x, the codes as it packs them, the group, scales and zeros [G, O, 2].

    There real = (code - 8) * scale + zero. It has whole tiles of bfloat16 alone, and is made for few tokens.
    """
    form = weight.form
    if x_TI.dtype != torch.bfloat16 or len(x_TI) > _INT4_TOKENS or form.group < _INT4_GROUP or form.outputs % 64:
        raise RuntimeError("torch's product with 4-bit weights is for few tokens of bfloat16 and whole tiles")
    codes_OI = int4.unpack(weight.packed)[: form.outputs, : form.inputs]
    if x_TI.device.type == "cuda":
        packed = torch._convert_weight_to_int4pack(codes_OI[:, ::2] << 4 | codes_OI[:, 1::2], _INT4_INNER_TILES)
    else:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
    scales_GO = weight.scales[: form.groups, : form.outputs].to(x_TI.dtype)
    zeros_GO = torch.zeros_like(scales_GO)
    if weight.zeros is not None:
        zeros_GO = (int4.MIDDLE - int4.unpack_zeros(weight.zeros)[: form.groups, : form.outputs].to(x_TI.dtype)) * scales_GO
    return x_TI, packed, form.group, torch.stack((scales_GO, zeros_GO), dim=-1).contiguous()


def int4_product(x_TI: Tensor, packed: Tensor, group: int, scales_and_zeros_GO2: Tensor) -> Tensor:
    """Return torch's product with a 4-bit weight."""
    call = torch._weight_int4pack_mm if x_TI.device.type == "cuda" else torch._weight_int4pack_mm_for_cpu
    return call(x_TI, packed, group, scales_and_zeros_GO2)


_INT4_TOKENS, _INT4_GROUP, _INT4_INNER_TILES = 64, 32, 8
OPS = {
    "embed": Library(name="F.embedding", call=nnf.embedding),
    "linear": Library(name="F.linear", call=nnf.linear),
    "linear_int4": Library(name="_weight_int4pack_mm", call=int4_product, prepare=int4_arguments),
    "linear_fp8": Library(name="_scaled_mm, fast", call=scaled_mm),
    "linear_fp8_fast": Library(name="_scaled_mm, fast", call=scaled_mm),
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
