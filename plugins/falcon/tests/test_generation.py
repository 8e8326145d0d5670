"""A folder that transformers saved generates what transformers generates, in today's spelling and in the first releases'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paddock import LLM, SamplingParams

PROMPTS = [[3, 4, 5, 6, 7], [9] * 20, [11]]
NEW_TOKENS = 12
FIRST_SPELLING = {
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embed",
    "num_kv_heads": "n_head_kv",
}


def respell(folder: Path) -> None:
    """Rewrite config.json as the first releases had it: short names, and the decoder told by `model_type` alone."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {FIRST_SPELLING.get(key, key): value for key, value in raw.items()}
    grouped = raw.pop("new_decoder_architecture")
    raw |= {"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb" if grouped else "RefinedWebModel"}
    (folder / "config.json").write_text(json.dumps(raw))


def greedy(reference: Any, prompt: list[int]) -> list[int]:
    """Return transformers' most likely continuation."""
    ids_1T = torch.tensor([prompt])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens: list[int] = reference.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options)[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("spelling", ["today", "first"])
def test_a_saved_folder_generates_what_transformers_does(
    variant: dict[str, Any], spelling: str, reference_model: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """Three prompts at once give the greedy tokens of each alone, from files and config.json to token ids."""
    reference = reference_model(variant | {"bos_token_id": 0, "eos_token_id": 1})
    reference.save_pretrained(tmp_path)
    if spelling == "first":
        respell(tmp_path)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    with LLM(tmp_path, device="cpu", dtype="float32", tokenizer="none", kv_cache_memory_bytes=1 << 24) as llm:
        answers = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]
    assert answers == [greedy(reference, prompt) for prompt in PROMPTS]
