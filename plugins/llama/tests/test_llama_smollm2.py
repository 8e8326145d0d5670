"""A trained Llama speaks the same here as in `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from paddock.testing.contracts import build_model
from paddock.testing.oracle import relative_rms
from paddock_llama.plugin import paddock_models

FOLDER = Path(__file__).parents[3] / "models" / "smollm2-135m-instruct"
BOUND = 1e-5


@pytest.mark.model
@pytest.mark.skipif(not FOLDER.exists(), reason="`make models` fetches SmolLM2")
def test_smollm2_logits_equal_transformers() -> None:
    """A batch of a prompt with decodes gives the logits of each text alone, in float32."""
    (spec,) = paddock_models()
    raw = json.loads((FOLDER / "config.json").read_text())
    state = {name: tensor.float() for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    built = build_model(spec, raw, state=state)
    generator = torch.Generator().manual_seed(0)
    texts = {name: torch.randint(raw["vocab_size"], (length,), generator=generator) for name, length in (("a", 37), ("b", 70))}
    found = built.run(
        [("a", texts["a"][:-1].tolist())],
        [("a", texts["a"][-1:].tolist()), ("b", texts["b"].tolist())],
    )
    reference: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    for name, tokens in texts.items():
        with torch.inference_mode():
            expected = reference(tokens[None]).logits[0]
        assert relative_rms(found[name], expected) < BOUND
