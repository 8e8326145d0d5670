"""`paddock quantize` on a GPU: layers are computed there, and what is written is what a CPU writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paddock.testing.oracle import relative_rms
from tests.quantize.made import logits_of, random_llama, run, tensors_of, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = "cuda"
RECIPES = [
    *((recipe, kv) for recipe in ("fp8-static", "fp8-dynamic", "fp8-official") for kv in ("float32", "fp8")),
    ("awq", "float32"),
]
# Calibration computes in bfloat16 on one device and may in float32 on the other, so scales differ, and what they round with them;
# how much rounding costs does not.
MOST_MORE = 1.3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random Llama in bfloat16: its weights are read into memory of another device than the file's bytes lie on."""
    return write_model(tmp_path_factory.mktemp("plain") / "llama", random_llama(torch.bfloat16))


@pytest.mark.parametrize(("recipe", "kv"), RECIPES)
def test_a_gpu_writes_what_a_cpu_writes(llama: Path, tmp_path: Path, recipe: str, kv: str) -> None:
    """The same tensors, which cost the model as little, whichever device runs them."""
    for device in ("cpu", DEVICE):
        run(llama, tmp_path / device, recipe, device=device, kv_cache_dtype="fp8" if kv == "fp8" else None)
    here, there = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / DEVICE)
    assert {name: (t.dtype, t.shape) for name, t in there.items()} == {name: (t.dtype, t.shape) for name, t in here.items()}
    if recipe != "awq":  # which folds its factors into norms
        kept = [name for name in here if "norm" in name or "embed" in name]
        assert kept
        assert all(torch.equal(there[name], here[name]) for name in kept)
    plain = logits_of(llama)
    most = MOST_MORE * relative_rms(logits_of(tmp_path / "cpu", kv_cache_dtype=kv), plain)
    assert relative_rms(logits_of(tmp_path / DEVICE, kv_cache_dtype=kv), plain) < most
    assert relative_rms(logits_of(tmp_path / DEVICE, device=DEVICE, kv_cache_dtype=kv), plain) < most
