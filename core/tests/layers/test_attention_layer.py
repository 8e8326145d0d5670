"""What attention hands to the linear behind it, whichever form its backend returns it in.

T tokens, H query heads, D head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from paddock.errors import CheckpointError
from paddock.layers import AttentionInputs, AttentionParams, LayerKV, Ops, QuantizedActivation, reference
from paddock.layers.attention_layer import Attention
from paddock.layers.formats import InputFormat

OUT_THD = torch.linspace(-9, 9, 24).view(3, 4, 2)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.tensor([[0.5], [1.0], [2.0], [4.0]])], ids=str)
def test_rows_that_are_wanted_keep_their_scales(scale: Tensor | None) -> None:
    """Of plain tensors, and of FP8 with a static scale or one a token; where nobody says which, all are."""
    x_TE, rows = torch.arange(12.0).view(4, 3), torch.tensor([3, 1])
    inputs: Any = AttentionInputs(
        positions_T=rows,
        slots_T=rows,
        query_start_S1=rows,
        seq_lens_S=rows,
        block_tables_SM=rows,
        page_size=1,
        num_decodes=0,
        max_query_len=1,
        max_seq_len=1,
    )
    given = x_TE if scale is None else QuantizedActivation(x_TE.to(reference.FP8), scale)
    assert inputs.wanted(given) is given
    found = evolve(inputs, wanted_R=rows).wanted(given)
    if scale is None:
        assert torch.equal(found, x_TE[rows])
        return
    assert found.values_TI.dtype == reference.FP8
    assert torch.equal(found.values_TI.float(), x_TE[rows])
    assert torch.equal(found.scale, scale if scale.ndim == 0 else scale[rows])


class Backend:
    """Returns a constant, in FP8 where it may and `fp8` says so."""

    def __init__(self, *, fp8: bool) -> None:
        self.fp8 = fp8
        self.scales: list[Tensor | None] = []

    def prepare(self, inputs: AttentionInputs) -> None:
        """Prepare nothing."""

    def attend(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams) -> Tensor:
        """Return the constant."""
        self.scales.append(params.out_scale)
        if self.fp8 and params.out_scale is not None:
            return reference.quantize_fp8_static(OUT_THD, params.out_scale).values_TI
        return OUT_THD


def attended(backend: Backend, *, scale: float | None) -> Any:
    """Return what attention emits where the linear behind takes FP8 by a static scale, or a plain input."""
    emits = InputFormat(Ops())
    if scale is not None:
        emits.name, emits.scale = "fp8_static", torch.tensor(scale)
    params, device = AttentionParams(scale=1.0), torch.device("cpu")
    layer = Attention(params, head_dim=2, backend=backend, ops=Ops(), emits=emits, device=device)
    kv, slots_T = LayerKV(torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)), torch.arange(3)
    inputs: Any = type("Inputs", (), {"slots_T": slots_T})()
    return layer(torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(3, 2), inputs, kv)


@pytest.mark.parametrize("fp8", [True, False])
def test_a_backend_may_quantise_by_the_static_scale(fp8: bool) -> None:
    """It is told the scale; whether it returns FP8 or leaves that to the layer, the linear is given the same."""
    backend = Backend(fp8=fp8)
    found = attended(backend, scale=0.01)
    expected = reference.quantize_fp8_static(OUT_THD.flatten(1), torch.tensor(0.01))
    assert isinstance(found, QuantizedActivation)
    assert torch.equal(found.values_TI.float(), expected.values_TI.float())
    assert torch.equal(found.scale, expected.scale)
    assert backend.scales == [torch.tensor(0.01)]


@pytest.mark.parametrize("name", ["q_scale", "q_proj.q_scale", "attn.q_scale", "q_proj.output_scale"])
def test_a_stored_scale_of_queries_is_read_where_they_become_fp8(name: str) -> None:
    """Under every name; where none is stored each token and head has its own, and where queries stay plain none is asked for."""
    for in_fp8, stored in ((True, 0.25), (True, None), (False, 0.25)):
        layer = Attention(
            AttentionParams(scale=1.0, in_fp8=in_fp8),
            head_dim=2,
            backend=Backend(fp8=False),
            ops=Ops(),
            emits=InputFormat(Ops()),
            device=torch.device("cpu"),
            scales_source="attn",
        )
        targets = {alias: target for target in layer.targets() for alias in (target.name, *target.aliases)}
        assert (f"attn.{name}" in targets) == in_fp8
        if in_fp8 and stored is not None:
            targets[f"attn.{name}"].view.fill_(stored)
        layer.finalise()
        q_scale = layer.params.q_scale
        assert (None if q_scale is None else q_scale.item()) == (stored if in_fp8 else None)


def test_a_scale_of_queries_that_is_none_is_refused() -> None:
    """Not a positive number: the checkpoint is at fault, and the error says which scale."""
    layer = Attention(
        AttentionParams(scale=1.0, in_fp8=True), head_dim=2, backend=Backend(fp8=False), ops=Ops(), emits=InputFormat(Ops()),
        device=torch.device("cpu"), scales_source="attn",
    )  # fmt: skip
    assert layer.q_scale is not None
    layer.q_scale.fill_(0.0)
    with pytest.raises(CheckpointError, match="the q scale of attn is 0"):
        layer.finalise()


class GivesQueries(Backend):
    """Returns the queries it is given."""

    def attend(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams) -> Tensor:
        """Return them as they are."""
        return q_THD


@pytest.mark.parametrize("rotated", [True, False])
def test_heads_may_come_apart(rotated: bool) -> None:
    """Views of groups, of two queries, a key and a value each, give the output and the pages that their copies give."""
    groups_TKXD = torch.randn(5, 3, 4, 2)
    q_TKGD, k_TKD, v_TKD = groups_TKXD[:, :, :-2], groups_TKXD[:, :, -2], groups_TKXD[:, :, -1]
    inputs: Any = type("Inputs", (), {"slots_T": torch.arange(5), "positions_T": torch.arange(5) + 1})()
    layer = Attention(
        AttentionParams(scale=1.0), head_dim=2, backend=GivesQueries(fp8=False), ops=Ops(), emits=InputFormat(Ops()),
        device=torch.device("cpu"), cos_sin_LD=torch.randn(8, 2) if rotated else None,
    )  # fmt: skip
    found, expected = (LayerKV(torch.zeros(1, 8, 3, 2), torch.zeros(1, 8, 3, 2)) for _ in range(2))
    out_TI = layer(q_TKGD, k_TKD, v_TKD, inputs, found)
    assert torch.equal(out_TI, layer(q_TKGD.flatten(1), k_TKD.flatten(1), v_TKD.flatten(1), inputs, expected))
    assert torch.equal(out_TI, q_TKGD.flatten(1)) != rotated
    assert torch.equal(found.k_pages_NPKD, expected.k_pages_NPKD)
    assert torch.equal(found.v_pages_NPKD[0, :5], v_TKD)
    with pytest.raises(AssertionError, match="heads of 1, not of 2"):
        layer(q_TKGD[..., :1], k_TKD, v_TKD, inputs, found)


def test_a_plain_linear_is_given_a_plain_tensor() -> None:
    """No scale is passed on, and nothing becomes FP8."""
    backend = Backend(fp8=True)
    assert torch.equal(attended(backend, scale=None), OUT_THD.flatten(1))
    assert backend.scales == [None]
