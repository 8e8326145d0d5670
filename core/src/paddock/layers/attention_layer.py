"""Attention as a model sees it: rotate, keep, attend.

T tokens, H query heads and K KV heads of this rank, G = H / K query heads of a KV head, D head size, I = H * D or K * D,
L positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from attrs import evolve
from torch import Tensor, nn

from paddock.checkpoint.targets import Target
from paddock.errors import CheckpointError
from paddock.layers.attention import AttentionBackend, AttentionInputs, AttentionParams, LayerKV
from paddock.layers.formats import InputFormat
from paddock.layers.op_marks import side_by_side
from paddock.layers.ops import Ops
from paddock.layers.quantized import Activation, QuantizedActivation
from paddock.layers.reference import FP8
from paddock.planning import kv_scales

_NAMES = kv_scales.NAMES | {"q": kv_scales.QUERIES}
_MISSING = -math.inf  # a scale that no checkpoint has filled
MAX_KV_SCALE = 1e4  # keys and values of a working model stay far below 448 times that
MIN_KV_SCALE = 1e-16  # and above it: tools floor a scale at 1e-12 / 448 or more


class Attention(nn.Module):
    """Causal attention over a sequence's pages. `k_scale` and `v_scale` are FP8 pages' scales, 1 unless the checkpoint has some.

    `q_scale`, of queries in FP8, is there where those are asked for (`params.in_fp8`), and once loaded None where the checkpoint
    has none: each token and head then has its own.

    `scales_source` is the checkpoint prefix of the attention block (`model.layers.0.self_attn`); empty when formats store none.
    """

    def __init__(
        self,
        params: AttentionParams,
        *,
        head_dim: int,
        backend: AttentionBackend,
        ops: Ops,
        emits: InputFormat,
        device: torch.device,
        cos_sin_LD: Tensor | None = None,
        scales_source: str = "",
    ) -> None:
        """Bind backend, ops and the rotary table (None: positions are not rotated)."""
        super().__init__()
        self.k_scale = nn.Parameter(torch.ones((), dtype=torch.float32, device=device), requires_grad=False)
        self.v_scale = nn.Parameter(torch.ones((), dtype=torch.float32, device=device), requires_grad=False)
        missing = torch.tensor(_MISSING, dtype=torch.float32, device=device) if params.in_fp8 else None
        self.q_scale = None if missing is None else nn.Parameter(missing, requires_grad=False)
        self.params = evolve(params, k_scale=self.k_scale, v_scale=self.v_scale, q_scale=self.q_scale)
        self.head_dim, self.backend, self.ops, self.emits = head_dim, backend, ops, emits
        self.cos_sin_LD, self.scales_source = cos_sin_LD, scales_source
        self._made_up = False  # whether the scales are no checkpoint's

    def forward(self, q_TI: Tensor, k_TI: Tensor, v_TI: Tensor, inputs: AttentionInputs, kv: LayerKV) -> Activation:
        """Return what each token gathers [T, H * D]; this step's k and v are in `kv` afterwards.

        Heads come side by side [T, I], or apart as views of a fused projection: k and v [T, K, D], q [T, H, D] or [T, K, G, D].
        """
        q_THD, k_TKD, v_TKD = (_heads(x_TI, self.head_dim) for x_TI in (q_TI, k_TI, v_TI))
        scales = self.k_scale, self.v_scale
        if self.cos_sin_LD is None:
            self.ops.cache_kv(k_TKD, v_TKD, kv, inputs.slots_T, *scales)
            q_THD = side_by_side(q_THD)
        else:
            q_THD = self.ops.rope_and_cache(q_THD, k_TKD, v_TKD, self.cos_sin_LD, inputs.positions_T, kv, inputs.slots_T, *scales)
        out_TI = self.backend.attend(q_THD, kv, inputs, self._params).flatten(1)
        if out_TI.dtype != FP8:
            return self.emits(out_TI)
        assert self.emits.scale is not None, "the backend returns FP8 where nobody asked for it"
        return QuantizedActivation(out_TI, self.emits.scale)

    @property
    def _params(self) -> AttentionParams:
        """Return the parameters, with the scale of the output where the linear behind takes it in FP8 by a static one."""
        return self.params if self.emits.scale is None else evolve(self.params, out_scale=self.emits.scale)

    def _scales(self) -> dict[str, nn.Parameter]:
        """Return the scales that a checkpoint may hold, by what they are of."""
        found = {"k": self.k_scale, "v": self.v_scale}
        return found if self.q_scale is None else found | {"q": self.q_scale}

    def targets(self) -> Iterator[Target]:
        """Yield where the checkpoint's scales go, under every name savers gave them; a checkpoint need hold none."""
        if not self.scales_source:
            return
        for kind, scale in self._scales().items():
            first, *aliases = (f"{self.scales_source}.{name}" for name in _NAMES[kind])
            yield Target(name=first, view=scale, shape=(), region=(), optional=True, aliases=tuple(aliases))

    def finalise(self) -> None:
        """Leave the scales as loaded and drop that of queries if none was; raise CheckpointError for one that is none."""
        if self._made_up:  # to look at them would wait for all that is still being drawn on a GPU
            self._drop_q_scale()
            return
        if self.q_scale is not None and self.q_scale.item() == _MISSING:
            self._drop_q_scale()
        for kind, scale in self._scales().items():
            if not MIN_KV_SCALE < scale.item() <= MAX_KV_SCALE:
                raise CheckpointError(
                    f"the {kind} scale of {self.scales_source or 'attention'} is {scale.item()}",
                    fix=f"scales are above {MIN_KV_SCALE:g} and at most {MAX_KV_SCALE:g}: make or download the checkpoint again",
                )

    def _drop_q_scale(self) -> None:
        """Let each token and head have its own scale of queries."""
        self.q_scale, self.params = None, evolve(self.params, q_scale=None)

    def randomise(self, generator: torch.Generator) -> None:
        """Leave the scales at 1, and queries without one."""
        self._made_up = True


def _heads(x_TI: Tensor, head_dim: int) -> Tensor:
    if x_TI.ndim == 2:
        return x_TI.view(x_TI.shape[0], x_TI.shape[1] // head_dim, head_dim)
    assert x_TI.shape[-1] == head_dim, f"heads of {x_TI.shape[-1]}, not of {head_dim}"
    return x_TI


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slopes [H] float32 of ALiBi (arXiv 2108.12409): a geometric series, then odd powers of its root."""
    base_heads = 1 << (num_heads.bit_length() - 1)
    series_H = _geometric(base_heads, torch.arange(1, base_heads + 1))
    extra_H = _geometric(2 * base_heads, 2 * torch.arange(num_heads - base_heads) + 1)
    return torch.cat((series_H, extra_H))


def _geometric(num_heads: int, powers: Tensor) -> Tensor:
    return torch.tensor(2.0 ** (-8.0 / num_heads), dtype=torch.float32) ** powers
