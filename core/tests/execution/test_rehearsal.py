"""The first steps are rehearsed inside every chosen plugin's context, each entered once, and leave nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attrs import evolve
from core.tests.planning.made import planned

from paddock.execution.kvcache import allocate_kv
from paddock.execution.rehearsal import compile_ahead, compilers
from paddock.execution.runner import Runner, SmallSteps
from paddock.execution.sampling_ops import REFERENCE_OPS
from paddock.planning.padding import CHUNK_TOKENS, REHEARSED_CHUNKS

HERE, CPU = __name__, torch.device("cpu")
LARGEST, MIXED = "8192 tokens, no decodes", f"{CHUNK_TOKENS[0] + 1} tokens, decodes"
DECODES = ["1 token, decodes", *(f"{size} tokens, decodes" for size in (2, 4, 8, 16, 32, 64, 128, 256))]
PROMPTS = [f"{size} tokens, no decodes" for size in REHEARSED_CHUNKS]
heard: list[str] = []


@contextmanager
def first(device: torch.device) -> Iterator[None]:
    """Note when it is entered and left."""
    heard.append(f"first on {device}")
    yield
    heard.append("first left")


@contextmanager
def second(device: torch.device) -> Iterator[None]:
    """Note the same."""
    heard.append(f"second on {device}")
    yield
    heard.append("second left")


class Model:
    """Notes its steps; all it is given are tokens and places that there are."""

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        assert not token_ids_T.any(), "a token that nobody gave"
        return torch.zeros(len(token_ids_T), 2)

    def forward(self, x_TE: torch.Tensor, inputs: Any, kv: Any) -> torch.Tensor:
        """Note the step; the values are nobody's."""
        assert inputs.slots_T.max() < 2 * inputs.page_size
        assert 0 <= inputs.block_tables_SM.min() <= inputs.block_tables_SM.max() < 2
        tokens = f"{len(x_TE)} token{'s' * (len(x_TE) > 1)}"
        heard.append(f"{tokens}, {'decodes' if inputs.num_decodes else 'no decodes'}")
        return torch.full_like(x_TE, float("nan"))

    def logits(self, x_RE: torch.Tensor) -> torch.Tensor:
        """Return logits that no next step may start from."""
        logits_RV = torch.zeros(len(x_RE), 96)
        logits_RV[:, 5] = 1.0
        return logits_RV


class Backend:
    """Prepares nothing."""

    def prepare(self, inputs: Any) -> None:
        """Return nothing."""


def _plan() -> Any:
    plan = planned(max_num_batched_tokens=8192)
    ops = tuple(evolve(spec, compile_ahead=f"{HERE}:second") for spec in plan.ops)
    return evolve(plan, attention=evolve(plan.attention, compile_ahead=f"{HERE}:first"), ops=ops)


def _rehearse(plan: Any, small_steps: SmallSteps) -> list[str]:
    model: Any = Model()
    backend: Any = Backend()
    kv = allocate_kv(num_layers=1, num_pages=2, page_size=64, num_kv_heads=1, head_dim=1, dtype="float32", device=CPU)
    heard.clear()
    compile_ahead(compilers(plan, CPU), plan, model, backend, REFERENCE_OPS, kv, small_steps)
    return [*heard]


@pytest.mark.parametrize("small_steps", [SmallSteps.PADDED, SmallSteps.CAPTURED])
def test_the_first_steps_are_taken_inside_every_context(small_steps: SmallSteps) -> None:
    """The largest step, decodes, prompts and both between entering and leaving; a context that many ops name comes once."""
    assert _rehearse(_plan(), small_steps) == [
        "first on cpu", "second on cpu", LARGEST, *DECODES, *PROMPTS, MIXED, DECODES[0], "second left", "first left",
    ]  # fmt: skip


def test_where_nothing_is_padded_only_the_largest_step_is_taken() -> None:
    """Which shapes will come is not known."""
    steps = _rehearse(_plan(), SmallSteps.AS_THEY_COME)
    assert LARGEST in steps
    assert not {*DECODES, *PROMPTS, MIXED} & {*steps}


def test_without_a_compiler_nothing_is_rehearsed() -> None:
    """The core's own implementations compile nothing at run time."""
    assert _rehearse(planned(), SmallSteps.CAPTURED) == []


def test_the_rehearsing_runner_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is free when pages are counted, without waiting for the garbage collector."""
    made: list[weakref.ref[Runner]] = []
    original = Runner.of

    def noted(*args: Any, **options: Any) -> Runner:
        runner = original(*args, **options)
        made.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(Runner, "of", noted)
    _rehearse(_plan(), SmallSteps.CAPTURED)
    (runner,) = made
    assert runner() is None
