"""A trained model quantised: what it loses is small, and it was truly changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from paddock.config import EngineConfig
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from paddock.quantize.text import read_text
from tests.assets.smollm2 import FOLDER
from tests.quantize.made import dequantised, tensors_of

TOKENS = 256


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Return how well transformers' model predicts a text."""
    logits = model(ids[None]).logits[0]
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item())


@pytest.mark.model
@pytest.mark.skipif(not FOLDER.exists(), reason="`make models` fetches SmolLM2")
def test_smollm2_in_fp8_predicts_as_well(tmp_path: Path) -> None:
    """Every recipe's weights cost at most 3% of perplexity on text none has seen; scales are as large as trained models'."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held_out = read_text("default").kept_apart.words
    ids = torch.tensor(AutoTokenizer.from_pretrained(FOLDER)(held_out).input_ids[:TOKENS])
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    before = perplexity(model, ids)
    for recipe in ("fp8-static", "fp8-dynamic", "fp8-official"):
        options = QuantizeOptions(recipe=recipe, out=tmp_path / recipe, kv_cache_dtype="fp8", samples=2, sequence_length=64)
        quantize(EngineConfig(model=str(FOLDER), device="cpu"), options)
        found = tensors_of(tmp_path / recipe)
        scales = torch.cat([tensor.float().flatten() for name, tensor in found.items() if name.endswith("_scale")])
        assert 1e-5 < scales.min() <= scales.max() < 10
        plain = dequantised(found)
        model.load_state_dict(plain | {"lm_head.weight": plain["model.embed_tokens.weight"]})
        after = perplexity(model, ids)
        assert after != before
        assert abs(after / before - 1) < 0.03, (recipe, before, after)
