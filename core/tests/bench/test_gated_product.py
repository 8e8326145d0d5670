"""The product that ends in an activation: the sizes it is measured at, and what its check sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve

from paddock.bench.kernels.case import Draw
from paddock.bench.kernels.fp8_cases import GATED
from paddock.bench.kernels.op_cases import FULL, SMALL, OpCases
from paddock.bench.kernels.verdict import op_verdict
from paddock.layers import reference

DRAW = Draw(device=torch.device("cpu"), dtype=torch.bfloat16)


@pytest.mark.parametrize("op", GATED)
def test_an_fp8_product_that_ends_in_an_activation_is_held_to_its_definition(op: str) -> None:
    """Itself differs in nothing; seen are values a step off, up taken for gate, a wrong block and another scale."""
    twin = getattr(reference, op)
    full = OpCases(table=FULL, draw=DRAW).of(op)
    assert [case.name for case in full if case.name.startswith("70B")] == [f"70B {t} x 8192 -> 2 x 28672" for t in (1, 16, 64)]
    last = full[-1]
    assert (last.kind, last.flops) == ("fp8", 2 * 64 * 57344 * 8192)
    assert last.nbytes == 57344 * 8192 + 64 * (8192 + 28672) + 4 * (57344 + 2)

    def a_step_off(*given: Any) -> Any:
        found = twin(*given)
        found.values_TI.view(torch.uint8)[:, ::20] ^= 1
        return found

    def up_for_gate(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        return twin(x, x_scale, weight.view(torch.uint8).roll(len(weight) // 2, 0).view(weight.dtype), *rest)

    def a_wrong_block(*given: Any) -> Any:
        found = twin(*given)
        found.values_TI.view(torch.uint8)[:, -2:] = 0
        return found

    def rescaled(*given: Any) -> Any:
        found = twin(*given)
        return evolve(found, scale=found.scale * 1.02)

    for case in OpCases(table=SMALL, draw=DRAW).of(op):
        assert op_verdict(op, twin, twin, case.make).error == 0
        for wrong in (a_step_off, up_for_gate, a_wrong_block, rescaled):
            assert not op_verdict(op, wrong, twin, case.make).right
