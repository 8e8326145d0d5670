from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from paddock.checkpoint.load import load
from paddock.errors import CheckpointError, PlanError
from paddock.layers import targets
from paddock.testing.contracts import build_model, check_model, check_tensor_parallel
from paddock.testing.oracle import relative_rms
from paddock_falcon.plugin import paddock_models

(SPEC,) = paddock_models()
BOUND = 1e-5  # relative RMS in float32
TOKENS = torch.randint(0, 62, (41,), generator=torch.Generator().manual_seed(2)).tolist()


def read_back(reference: Any) -> dict[str, Any]:
    """Return the config.json transformers writes for a model."""
    raw: dict[str, Any] = json.loads(reference.config.to_json_string())
    return raw


def test_logits_agree_with_transformers(variant: dict[str, Any], reference_model: Callable[[dict[str, Any]], Any]) -> None:
    """From the same weights every variant gives the logits of transformers, all at once and token by token."""
    reference = reference_model(variant)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    built = build_model(SPEC, read_back(reference), state=reference.state_dict())
    assert relative_rms(built.run([("a", TOKENS)])["a"], expected) < BOUND
    token_by_token = [[("a", TOKENS[:17])], *([("a", [token])] for token in TOKENS[17:])]
    assert relative_rms(built.run(*token_by_token)["a"], expected) < BOUND


def test_every_variant_keeps_the_model_contracts(variant: dict[str, Any]) -> None:
    """Chunking, batching, permuting, sharding and loading change no logits; ranks that cannot cut one KV group all hold it."""
    check_model(SPEC, variant)


def test_ranks_that_cannot_sum_over_groups_are_refused() -> None:
    """Four ranks hold one of two KV groups each, twice over: their sums would count it twice, so they are an error."""
    grouped = {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    with pytest.raises(PlanError, match="2 kv_heads: 4 ranks"):
        check_tensor_parallel(SPEC, grouped | {"num_hidden_layers": 1, "vocab_size": 64}, world=4)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_may_be_stored_and_an_untied_one_must_be(
    reference_model: Callable[[dict[str, Any]], Any], tmp_path: Path, *, tied: bool, stored: bool
) -> None:
    """Files with and without `lm_head.weight` load into a tied model; without it an untied one is an error naming it."""
    reference = reference_model({"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 62})
    state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    expected = build_model(SPEC, read_back(reference), state=state).run([("a", TOKENS)])["a"]
    if not stored:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    built = build_model(SPEC, read_back(reference) | {"tie_word_embeddings": tied})
    if not tied and not stored:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            load(tmp_path, targets(built.model), ignored_suffixes=built.table.ignored)
        return
    load(tmp_path, targets(built.model), ignored_suffixes=built.table.ignored)
    assert torch.equal(built.run([("a", TOKENS)])["a"], expected)
