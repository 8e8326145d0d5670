"""What attention is given and what a backend must do: the seam between a model, the KV pages and the kernels.

T tokens, S sequences, H query heads, K KV heads, D head size, N pages, P tokens a page, M pages a sequence at most; R tokens from
which something is predicted.
"""

from __future__ import annotations

from typing import Any, Protocol, overload

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from paddock.layers.quantized import Activation


@frozen(eq=False)
class LayerKV:
    """One layer's pages, contiguous. Token t of a sequence lies in page `block_tables[s, t // P]`, row `t % P`."""

    k_pages_NPKD: Tensor
    v_pages_NPKD: Tensor

    @property
    def page_size(self) -> int:
        """Return P."""
        return self.k_pages_NPKD.shape[1]


@frozen(eq=False, kw_only=True)
class AttentionInputs:
    """Where the tokens of a step belong. Sequences lie one after the other, single-token decodes first.

    `positions_T` int64; `slots_T` int64, page * P + row, where each token's K and V are written; `query_start_S1` int32,
    first token of each sequence and the total; `seq_lens_S` int32, tokens of each sequence including this step's;
    `block_tables_SM` int32, pages of `page_size` tokens. The maxima are host integers. `prepared` is what the backend made of
    it for this step. `wanted_R` int64, the tokens, in their order, whose residual stream after the model's last layer is
    wanted, of a rank that holds it; None for all: see `wanted`.
    """

    positions_T: Tensor
    slots_T: Tensor
    query_start_S1: Tensor
    seq_lens_S: Tensor
    block_tables_SM: Tensor
    page_size: int
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    prepared: Any = field(default=None)
    wanted_R: Tensor | None = None

    @overload
    def wanted(self, x_TE: Tensor) -> Tensor: ...

    @overload
    def wanted(self, x_TE: Activation) -> Activation: ...

    def wanted(self, x_TE: Activation) -> Activation:
        """Return the rows [R, E] of the tokens whose residual stream is wanted.

        Behind the last attention a model need compute no others: of a prompt that is one. Elsewhere every token is wanted.
        """
        if self.wanted_R is None:
            return x_TE
        if isinstance(x_TE, Tensor):
            return x_TE.index_select(0, self.wanted_R)
        values_RE = x_TE.values_TI.view(torch.uint8).index_select(0, self.wanted_R).view(x_TE.values_TI.dtype)
        scale = x_TE.scale if x_TE.scale.ndim == 0 else x_TE.scale.index_select(0, self.wanted_R)
        return evolve(x_TE, values_TI=values_RE, scale=scale)


@frozen(eq=False, kw_only=True)
class AttentionParams:
    """What one layer's attention computes: softmax(scale * q k^T + bias), causal.

    `alibi_slopes_H` float32: adds `slope * scale * key position` to the logits (Falcon's form). `window`: keys a query
    sees, itself included. `softcap`: logits become cap * tanh(logits / cap). `k_scale`, `v_scale`: float32 scalars, real =
    stored * scale. `in_fp8`: queries and probabilities are rounded to FP8 e4m3 before they meet FP8 keys and values, as
    `layers.fp8_attention` defines; `q_scale` float32 scalar is the queries' scale then, None for one a token and head, its
    largest magnitude at 448. `out_scale` float32 scalar; where it is given, the linear behind takes FP8 divided by it, and a
    backend may return that.
    """

    scale: float
    alibi_slopes_H: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    in_fp8: bool = False
    q_scale: Tensor | None = None
    out_scale: Tensor | None = None


class AttentionBackend(Protocol):
    """Causal attention over paged KV for sequences of any length in one call."""

    def prepare(self, inputs: AttentionInputs) -> Any:
        """Return what the backend wants to know once a step, before any layer runs (kept in `inputs.prepared`)."""

    def attend(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams) -> Tensor:
        """Return the attention output [T, H, D] in q's dtype; this step's K and V are already in the pages.

        With `params.out_scale` it may be FP8 e4m3: the output rounded to q's dtype, divided by the scale, saturated at 448.
        """


class Model(Protocol):
    """What `ModelSpec.build` returns: the three stages the runner calls, each a pure function of its arguments."""

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return the residual stream [T, E] for token ids (int64)."""

    def forward(self, x_TE: Tensor, inputs: AttentionInputs, kv: list[LayerKV]) -> Tensor:
        """Return the residual stream after the layers this rank holds; `kv[i]` belongs to the i-th of them.

        Where some tokens alone are wanted (`inputs.wanted`) it is theirs [R, E], or all tokens' as well.
        """

    def logits(self, x_RE: Tensor) -> Tensor:
        """Return logits [R, V] for rows of the residual stream, in the head's dtype or float32: final norm, then head."""
