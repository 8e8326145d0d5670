"""Block-scaled files of these tests mean to transformers what they are said to mean. Runs where `accelerate` is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.zoo.formats import Written, store_blocks
from tests.zoo.test_quantised_checkpoints import LLAMA, written_to

pytest.importorskip("accelerate", reason="transformers loads no FP8 without it")
SPARED = "layers.1.self_attn.o_proj"


@pytest.mark.filterwarnings("ignore")
def test_transformers_dequantises_blocks_to_the_same_weights(tmp_path: Path) -> None:
    """Scales called inverse multiply, blocks lie where ours lie, and the list spares what it spares here: no difference."""
    from transformers import AutoModelForCausalLM

    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8], "dequantize": True}
    entry["modules_to_not_convert"] = ["lm_head", f"model.{SPARED}"]
    written = Written(entry=entry, store=lambda weight_OI: store_blocks(weight_OI, (8, 8), "weight_scale_inv"))
    meant = written_to(tmp_path, "llama", written, SPARED)
    config = LLAMA | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": entry}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    linears = [name for name in meant if name.endswith("proj.weight")]
    assert len(linears) == 14
    for name in linears:
        assert torch.equal(found[name], meant[name]), name
