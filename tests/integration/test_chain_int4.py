"""A decode's INT4 products in one launch as far as that goes without a GPU: the kernel's roles as threads, held to its ops.

Codes are made numbers as `paddock.layers.int4` says, not as the kernel does, which `test_ops_linear_int4` holds to its twin.

T tokens, E embed, F feed-forward, Q outputs of q, k and v.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import QuantizedActivation, reference
from paddock.layers.int4 import Int4Weight, int4_weight
from paddock.testing.oracle import relative_rms
from paddock_triton import int4_bringing, linear_ring_gated, ops_activation, ops_linear_int4, ring, ring_parts
from tests.bench import chain_candidate, chain_int4_candidate, chain_stack, layer_stack
from tests.bench.chain_candidate import Norm
from tests.bench.chain_int4_candidate import chain_of, launch_chain
from tests.integration.gluon_on_cpu import Device
from tests.integration.test_compile_ahead import MODEL

HALF = torch.bfloat16


def _codes(packed_CJ: Tensor) -> Tensor:
    """Return the codes of four slabs of a block [64, 128], of the bytes as they lie [32, 128]."""
    words = packed_CJ.nan_to_num(nan=0).to(torch.uint8).reshape(4, 2, 8, 4, 2, 2, 4)  # slab, c, r, t, v, h, i
    both = torch.stack((words & 15, words >> 4), 1)  # of output r, and of r + 8
    return both.permute(0, 1, 3, 2, 5, 6, 4, 7).reshape(64, 128).float()


def _step(accs: Any, slots: Any, m: int, INDEX: int, spec: Any) -> Any:
    """Do what a team does with a step: as `int4_multiplying` has it, but for how codes become numbers."""
    packed, scales, zeros, x, full, free = slots
    slot, sum_RN = m % spec.slots, accs[0]
    full.index(slot).wait(m // spec.slots & 1)
    for piece in range(INDEX * spec.depth, (INDEX + 1) * spec.depth):
        zero_SY = zeros.index(slot).values[piece, :32].view(4, 8)  # slab, and row r below row r + 8
        zero_R1 = torch.stack((zero_SY % 16, zero_SY // 16), 1).reshape(64, 1)
        codes_RK = _codes(packed.index(slot * spec.pieces + piece).values) - zero_R1
        x_NK, scale_R = x.index(slot * spec.pieces + piece).values, scales.index(slot).values[piece]
        sum_RN = sum_RN + (codes_RK @ x_NK.T) * scale_R[:, None]
    free.index(slot).add(1, 0)
    return sum_RN, *accs[1:]


class Given:
    """Weights from o to the next layer's q, k and v; x and the residual, written only when the kernel before ends."""

    def __init__(self, tokens: int, inputs: int, embed: int, feed: int, outputs: int) -> None:
        self.draw = torch.Generator().manual_seed(tokens + embed)
        self.x = reference.quantize_fp8_token(self._normal(tokens, inputs).to(HALF))
        self.residual_TE = self._normal(tokens, embed).to(HALF)
        self.weights = tuple(
            self._weight(*size) for size in ((embed, inputs), (2 * feed, embed), (embed, feed), (outputs, embed))
        )
        norm, after = (Norm(weight_E=1 + 0.1 * self._normal(embed).to(HALF), eps=1e-5) for _ in range(2))
        self.norms = norm, after
        values_TI, scale_T1 = torch.full_like(self.x.values_TI.float(), torch.nan), torch.full_like(self.x.scale, torch.nan)
        self.late, self.late_TE = QuantizedActivation(values_TI.to(torch.float8_e4m3fn), scale_T1), self.residual_TE * torch.nan

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def _weight(self, outputs: int, inputs: int) -> Int4Weight:
        codes_OI = torch.randint(16, (outputs, inputs), generator=self.draw, dtype=torch.uint8)
        zeros_GO = torch.randint(16, (inputs // 128, outputs), generator=self.draw, dtype=torch.uint8)
        scales_GO = (0.5 + torch.rand(inputs // 128, outputs, generator=self.draw)) * 0.2 * inputs**-0.5
        return int4_weight(codes_OI, scales_GO.to(HALF), zeros_GO)

    def arrive(self) -> None:
        """Write what the kernel before writes."""
        self.late.values_TI.view(torch.uint8).copy_(self.x.values_TI.view(torch.uint8))
        self.late.scale.copy_(self.x.scale)
        self.late_TE.copy_(self.residual_TE)

    def expected(self) -> tuple[Tensor, ...]:
        """Return what the ops give one after the other."""

        def product(x: QuantizedActivation, weight: Int4Weight) -> Tensor:
            return reference.linear_int4_fp8(x.values_TI, x.scale, weight, self.residual_TE.dtype)

        (norm, after), (o, gate_up, down, qkv) = self.norms, self.weights
        total_TE, h = reference.rms_norm_fp8(self.residual_TE, product(self.x, o), norm.weight_E, norm.eps, None, None)
        down_TE = product(reference.silu_mul_fp8(product(h, gate_up), None, None), down)
        next_TE, h = reference.rms_norm_fp8(total_TE, down_TE, after.weight_E, after.eps, None, None)
        return total_TE, next_TE, product(h, qkv)


def _run(given: Given, programs: int, seed: int, counted: Tensor, *, shared: bool, depth: int) -> tuple[Tensor, ...]:
    """Return what the roles write on a CPU; all launches count in `counted`."""
    device = Device(seed)

    def launch(
        kernel: Any, grid: tuple[int], *args: Any, num_warps: int, maxnreg: Any, launch_pdl: bool = False, **options: Any
    ) -> None:
        waiting, asked = grid[0] * 5, grid[0] * (options["chain"].o.pieces + 2)  # codes of a step, scales, zeros
        device.run_behind(given.arrive, kernel, grid[0], args, options, waiting=waiting, asked=asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_int4_candidate, "processors", lambda _device: programs)
        patch.setattr(chain_int4_candidate, "launch", launch)
        patch.setattr(chain_int4_candidate, "counters", lambda _device, count: counted[:count])
        patch.setattr(chain_int4_candidate, "SLICE", 256)
        chain = chain_of(len(given.x.values_TI), given.weights, shared=shared, slots=3, depth=depth, reads=seed > 0)
        taken = [chain_int4_candidate, chain_candidate, int4_bringing, linear_ring_gated, ring, ring_parts, ops_activation]
        device.pretend(patch, taken)
        for name in ("_step_fp8", "_step_two"):
            patch.setattr(chain_int4_candidate, name, _step)
        for name in ("gl", "barriers", "TensorDescriptor"):
            patch.setattr(ops_linear_int4, name, vars(linear_ring_gated).get(name) or vars(ring)[name])
        return launch_chain(given.late, given.late_TE, given.norms, given.weights, chain)


@pytest.mark.parametrize(("tokens", "programs", "shared", "depth"), [(1, 3, True, 1), (3, 5, False, 2), (11, 11, True, 1)])
def test_a_chain_gives_what_its_ops_give(tokens: int, programs: int, shared: bool, depth: int) -> None:
    """More steps than slots, more slices than programs; twice over on the same counts, which are left at zero."""
    counted, given = torch.zeros(1 << 10, dtype=torch.int32), Given(tokens, 640, 768, 1152, 328)
    first, second = (_run(given, programs, seed, counted, shared=shared, depth=depth) for seed in range(2))
    for found, again, expected in zip(first, second, given.expected(), strict=True):
        assert torch.equal(found, again)
        assert relative_rms(found.float(), expected.float()) < 0.01
    assert not counted.any()


def _by_ops(
    x: QuantizedActivation, residual_TE: Tensor, norms: tuple[Norm, Norm], weights: tuple[Int4Weight, ...], chain: object
) -> tuple[Tensor, ...]:
    """Return what a chain gives, by the ops it is made of."""
    given: Any = SimpleNamespace(x=x, residual_TE=residual_TE, norms=norms, weights=weights)
    return Given.expected(given)


def test_layers_say_the_same_with_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever slots there are: the last layer runs op by op."""
    int4 = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    config = MODEL | {"num_hidden_layers": 3, "max_position_embeddings": 2048, "quantization_config": int4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for module in (layer_stack, chain_stack):
        monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(layer_stack, "graph_seconds", lambda call, _sets: float(call() is not None))
    monkeypatch.setattr(chain_int4_candidate, "launch_chain", _by_ops)
    asked = [str(tmp_path), "--rows", "2", "--context", "20", "--int4-compute", "w4a8"]
    result = CliRunner().invoke(chain_stack.main, asked, catch_exceptions=False)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [each["products"] for each in found] == [*chain_stack.INT4_FORWARDS]
    assert all(each["apart"] == 0 for each in found)
