"""A decode's products in one launch as far as that goes without a GPU: the kernel's roles as threads, held to its ops.

T tokens, E embed, F feed-forward, Q outputs of q, k and v.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from click.testing import CliRunner
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.layers.reference import FP8
from paddock.testing.oracle import relative_rms
from paddock_triton import linear_ring, linear_ring_gated, ops_activation, ring, ring_parts
from tests.bench import chain_candidate, chain_stack, layer_stack
from tests.bench.chain_candidate import Linear, Norm, chain_of, launch_chain
from tests.integration.gluon_on_cpu import Device
from tests.integration.test_compile_ahead import MODEL

HALF = torch.bfloat16
STATIC = {
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


class Given:
    """Weights of a layer and of the next one's q, k and v; x and the residual, written only when the kernel before ends."""

    def __init__(self, tokens: int, embed: int, feed: int, outputs: int) -> None:
        self.draw = torch.Generator().manual_seed(tokens + embed)
        self.x_TI, self.residual_TE = self._normal(tokens, embed).to(FP8), self._normal(tokens, embed).to(HALF)
        self.o, self.gate_up = self._linear(embed, embed, 0.4), self._linear(2 * feed, embed, 0.01)
        self.down, self.qkv = self._linear(embed, feed, 0.02), self._linear(outputs, embed, 0.01)
        self.norm, self.following = (Norm(weight_E=1 + 0.1 * self._normal(embed).to(HALF), eps=1e-5) for _ in range(2))
        self.late_TI, self.late_TE = torch.full_like(self.x_TI.float(), torch.nan).to(FP8), self.residual_TE * torch.nan

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def _linear(self, rows: int, columns: int, scale: float) -> Linear:
        scale_O1 = (0.5 + torch.rand(rows, 1, generator=self.draw)) * columns**-0.5
        return Linear(weight_OI=self._normal(rows, columns).to(FP8), scale_O1=scale_O1, x_scale=torch.tensor(scale))

    def arrive(self) -> None:
        """Write what the kernel before writes."""
        self.late_TI.view(torch.uint8).copy_(self.x_TI.view(torch.uint8))
        self.late_TE.copy_(self.residual_TE)

    def expected(self, *, following: bool) -> tuple[Tensor, ...]:
        """Return what the ops give one after the other."""
        dtype = self.residual_TE.dtype

        def product(x_TI: Tensor, of: Linear) -> Tensor:
            return reference.linear_fp8(x_TI, of.x_scale, of.weight_OI, of.scale_O1, dtype)

        delta_TE, up, norm = product(self.x_TI, self.o), self.gate_up, self.norm
        total_TE, h = reference.rms_norm_fp8(self.residual_TE, delta_TE, norm.weight_E, norm.eps, up.x_scale, None)
        given = h.values_TI, up.x_scale, up.weight_OI, up.scale_O1, dtype, self.down.x_scale
        down_TE = product(reference.linear_silu_mul_fp8(*given).values_TI, self.down)
        if not following:
            return total_TE, down_TE
        norm, scale = self.following, self.qkv.x_scale
        next_TE, h = reference.rms_norm_fp8(total_TE, down_TE, norm.weight_E, norm.eps, scale, None)
        return total_TE, next_TE, product(h.values_TI, self.qkv)


def _run(given: Given, programs: int, seed: int, counted: Tensor, *, shared: bool, following: bool) -> tuple[Tensor, ...]:
    """Return what the roles write on a CPU; all launches count in `counted`."""
    device = Device(seed)

    def launch(
        kernel: Any, grid: tuple[int], *args: Any, num_warps: int, maxnreg: Any, launch_pdl: bool = False, **options: Any
    ) -> None:
        tile = options["chain"].o
        waiting, asked = grid[0] * (tile.teams + 1), grid[0] * tile.pieces  # all but who copies weights
        device.run_behind(given.arrive, kernel, grid[0], args, options, waiting=waiting, asked=asked)

    with pytest.MonkeyPatch.context() as patch:
        for module in (linear_ring, chain_candidate):
            patch.setattr(module, "processors", lambda _device: programs)
        patch.setattr(chain_candidate, "launch", launch)
        patch.setattr(chain_candidate, "counters", lambda _device, count: counted[:count])
        patch.setattr(chain_candidate, "DTYPES", {HALF: HALF})
        device.pretend(patch, [chain_candidate, linear_ring, linear_ring_gated, ring, ring_parts, ops_activation])
        chain = chain_of(len(given.x_TI), given.o, given.gate_up, given.down, given.qkv if following else None, HALF)
        cut = {name: evolve(getattr(chain, name), shared=shared) for name in ("o", "gate_up", "down")}
        chain = evolve(chain, **cut, reads=seed > 0, qkv=None if chain.qkv is None else evolve(chain.qkv, shared=shared))
        after = (given.following, given.qkv) if following else None
        return launch_chain(given.late_TI, given.late_TE, given.o, given.norm, given.gate_up, given.down, after, chain)


@pytest.mark.parametrize(
    ("tokens", "programs", "shared", "following"),
    [(1, 3, False, True), (5, 7, True, False), (5, 7, True, True), (20, 20, False, True)],
)
def test_a_chain_gives_what_its_ops_give(tokens: int, programs: int, shared: bool, following: bool) -> None:
    """Sides that fill no tile, more steps than slots; twice over on the same counts, which are left at zero."""
    counted, given = torch.zeros(1 << 10, dtype=torch.int32), Given(tokens, 656, 1040, 328)
    first, second = (_run(given, programs, seed, counted, shared=shared, following=following) for seed in range(2))
    for found, again, expected in zip(first, second, given.expected(following=following), strict=True):
        assert torch.equal(found, again)
        assert relative_rms(found.float(), expected.float()) < 0.01
    assert not counted.any()


def _by_ops(
    x_TI: Tensor,
    residual_TE: Tensor,
    o: Linear,
    norm: Norm,
    gate_up: Linear,
    down: Linear,
    after: tuple[Norm, Linear] | None,
    chain: object,
) -> tuple[Tensor, ...]:
    """Return what a chain gives, by the ops it is made of."""
    given: Any = SimpleNamespace(x_TI=x_TI, residual_TE=residual_TE, o=o, norm=norm, gate_up=gate_up, down=down)
    given.following, given.qkv = after or (None, None)
    return Given.expected(given, following=after is not None)


def test_layers_say_the_same_with_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether each ends with down or with the next one's q, k and v."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL | STATIC))
    cpu = torch.device("cpu")
    for module in (layer_stack, chain_stack):
        monkeypatch.setattr(module, "CUDA", cpu)
    monkeypatch.setattr(layer_stack, "graph_seconds", lambda call, _sets: float(call() is not None))
    monkeypatch.setattr(chain_stack, "launch_chain", _by_ops)
    monkeypatch.setattr(chain_candidate, "DTYPES", {torch.float32: None})  # what the CPU computes in
    result = CliRunner().invoke(chain_stack.main, [str(tmp_path), "--rows", "2", "--context", "20"], catch_exceptions=False)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [each["products"] for each in found] == [*chain_stack.FORWARDS]
    assert all(each["apart"] == 0 for each in found)
