"""Tiny random models in folders, and runs of `paddock quantize` on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from paddock.config import EngineConfig
from paddock.quantize.manifest import Manifest
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from paddock.testing.paging import step
from paddock.testing.text import SPECIAL, byte_level_tokenizer
from tests.assets.built import build

LAYERS, LENGTH, SAMPLES = 4, 24, 6
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
FALCON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
    "num_hidden_layers": LAYERS,
    "vocab_size": 300,
    "initializer_range": 0.15,
}
TEXT = "the quick brown fox jumps over the lazy dog; a paddock keeps horses, a runtime keeps models. " * 12
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def random_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random Llama of transformers with norms that are not all ones."""
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(LlamaConfig(**(LLAMA | changes)))
    return _settled(model, dtype)


def random_falcon(**changes: Any) -> Any:
    """Return a random Falcon, of the 40B's kind unless changed."""
    torch.manual_seed(4)
    model: Any = FalconForCausalLM(FalconConfig(**(FALCON | changes)))
    return _settled(model, torch.float32)


def _settled(model: Any, dtype: torch.dtype) -> Any:
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def write_model(folder: Path, model: Any) -> Path:
    """Write a model of transformers as a folder with a tokenizer and a calibration text beside it."""
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors")
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "torch_dtype": str(model.dtype)[6:]}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    byte_level_tokenizer().core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def run(model: Path, out: Path, recipe: str, *, device: str = "cpu", **options: Any) -> Manifest:
    """Quantise a model, on the CPU unless told otherwise.

    A recipe that is calibrated reads six sequences of 24 tokens; `awq` has groups of 32.
    """
    if recipe == "awq" and "tp_compatible" not in options:
        options = {"group_size": 32} | options
    if recipe in ("fp8-static", "awq") or options.get("kv_cache_dtype"):
        options = {"calibration": str(model.parent / "text.txt"), "samples": SAMPLES, "sequence_length": LENGTH} | options
    return quantize(EngineConfig(model=str(model), device=device), QuantizeOptions(recipe=recipe, out=out, **options))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, found through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(index.values())}
    assert sorted(index) == sorted(name for tensors in files.values() for name in tensors)
    return {name: files[file][name] for name, file in index.items()}


def sequences() -> Tensor:
    """Return the token ids [6, 24] that calibration reads: of the text without its last fifth, from its beginning."""
    ids = byte_level_tokenizer().encode(TEXT[: len(TEXT) * 4 // 5], add_special_tokens=False)
    return torch.tensor(ids[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)


def logits_of(folder: Path, *, device: str = "cpu", kv_cache_dtype: str = "float32") -> Tensor:
    """Return the logits [6, 24, V] that Paddock computes in float32 for the calibration text."""
    options = {"dtype": "float32", "device": device, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 24}
    ours = build(folder, **options, kv_cache_dtype=kv_cache_dtype)
    chunks = [(str(i), row.tolist()) for i, row in enumerate(sequences())]
    return torch.stack(step(ours.model, ours.pages(len(chunks), length=64), ours.backend, chunks)).cpu()


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return plain float32 tensors by the formats' definition: real = stored * scale; scales themselves are left out."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            continue
        scale = tensors.get(f"{name}_scale")
        if tensor.dtype != torch.float8_e4m3fn:
            assert scale is None
            plain[name] = tensor.float()
        else:
            assert scale is not None
            plain[name] = tensor.float() * scale.float()
    return plain
