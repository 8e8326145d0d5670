"""Fast sums of FP8 products, from the option to the product that a model calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from paddock import LLM, SamplingParams
from paddock.layers import reference
from paddock.planning.serial import fingerprint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
}


def test_a_model_calls_the_product_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all its linears in FP8; on a CPU both are one definition, and tokens are the same."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    called: list[str] = []
    plain: Any = reference.linear_fp8
    for name in ("linear_fp8", "linear_fp8_fast"):

        def product(*given: Any, name: str = name) -> Tensor:
            called.append(name)
            found: Tensor = plain(*given)
            return found

        monkeypatch.setattr(reference, name, product)
    tokens, plans = [], []
    for asked in ("exact", "fast"):
        called.clear()
        with LLM(tmp_path, device="cpu", load_format="dummy", tokenizer="none", fp8_accumulation=asked) as llm:
            (found,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4), progress=False)
            plans.append(llm.plan)
        tokens.append(found.outputs[0].token_ids)
        assert set(called) == {{"exact": "linear_fp8", "fast": "linear_fp8_fast"}[asked]}
    assert tokens[0] == tokens[1]
    assert [plan.fp8_accumulation for plan in plans] == ["exact", "fast"]
    assert fingerprint(plans[0]) != fingerprint(plans[1])
