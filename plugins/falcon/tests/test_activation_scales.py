"""AWQ checkpoints of Falcon may hold `mlp.act.scales`: numbers that divide the GELU, and are in the columns behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from paddock import axes
from paddock.checkpoint.load import load
from paddock.errors import CheckpointError
from paddock.layers import Communicator, finalise, targets
from paddock.testing.contracts import BuiltModel, build_model
from paddock.testing.oracle import relative_rms
from paddock.testing.paging import step
from paddock.testing.ranks import run_ranks
from paddock_falcon.model import MLP
from paddock_falcon.plugin import paddock_models

(SPEC,) = paddock_models()
RAW: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64, "bias": True}
TOKENS = torch.randint(0, 64, (19,), generator=torch.Generator().manual_seed(5)).tolist()
CUTS = frozenset({axes.KV_HEADS, axes.FFN, axes.VOCAB})
BOUND = 1e-5


@pytest.fixture
def reference(reference_model: Callable[[dict[str, Any]], Any]) -> Any:
    """Return transformers' model, unscaled."""
    return reference_model(RAW)


def scaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same function as AWQ stores it: the second linear's columns times scales, the scales beside it."""
    stored = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in stored if name.endswith("mlp.dense_4h_to_h.weight")]:
        scales_F = torch.rand(stored[name].shape[1], generator=generator) * 3 + 0.25
        stored[name] = stored[name] * scales_F
        stored[name.replace("dense_4h_to_h.weight", "act.scales")] = scales_F
    return stored


def expected(reference: Any) -> Tensor:
    """Return transformers' logits."""
    with torch.no_grad():
        logits_TV: Tensor = reference(torch.tensor([TOKENS])).logits[0]
    return logits_TV


def from_file(folder: Path, state: dict[str, Tensor]) -> BuiltModel:
    """Return the model a file fills, strictly."""
    save_file(state, folder / "model.safetensors")
    built = build_model(SPEC, RAW, finalised=False)
    load(folder, targets(built.model), ignored_suffixes=built.table.ignored)
    finalise(built.model)
    return built


def test_stored_scales_divide_the_activation(reference: Any, tmp_path: Path) -> None:
    """A file whose scales and columns undo each other gives the logits of the model without them."""
    state = scaled(reference.state_dict())
    assert relative_rms(from_file(tmp_path, state).run([("a", TOKENS)])["a"], expected(reference)) < BOUND
    without = {name: tensor for name, tensor in state.items() if not name.endswith("act.scales")}
    assert relative_rms(build_model(SPEC, RAW, state=without).run([("a", TOKENS)])["a"], expected(reference)) > 0.01


def test_ranks_hold_the_scales_of_their_columns(reference: Any) -> None:
    """Two and four ranks give what one gives."""
    state = scaled(reference.state_dict())
    for world in (2, 4):
        for logits_TV in run_ranks(world, partial(_rank, state, world)):
            assert relative_rms(logits_TV, expected(reference)) < BOUND


def test_scales_of_one_cost_nothing_after_loading(reference: Any, tmp_path: Path) -> None:
    """Loaders that want the tensor are served with ones; they, and no scales at all, leave nothing to divide by."""
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    ones = {f"transformer.h.{i}.mlp.act.scales": torch.ones(128, dtype=torch.float16) for i in range(2)}
    for stored in (state | ones, state):
        model = from_file(tmp_path, stored).model
        assert [module.gelu.scales for module in model.modules() if isinstance(module, MLP)] == [None, None]


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(reference: Any, tmp_path: Path, wrong: float) -> None:
    """Dividing by it would give no answer; the tensor is named."""
    state = scaled(reference.state_dict())
    state["transformer.h.1.mlp.act.scales"][3] = wrong
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.act\.scales"):
        from_file(tmp_path, state)


def _rank(state: dict[str, Tensor], world: int, rank: int, communicator: Communicator) -> Tensor:
    built = build_model(SPEC, RAW, state=state, shard=axes.Shard(rank, world, CUTS), communicator=communicator)
    (logits_TV,) = step(built.model, built.pages(kv_heads=1), built.backend, [("a", TOKENS)])
    return logits_TV
