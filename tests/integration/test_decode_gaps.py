"""The benchmark of what lies between decode steps, as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paddock import LLM, EngineConfig
from paddock.assemble import assemble
from tests.bench.decode_gaps import SETTLED, WATCHER, Kernel, Watcher, added, host_microseconds

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def test_steps_are_kept_until_they_are_taken(tmp_path: Path) -> None:
    """Each once: none is left for the next batch, and another watcher has its own."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    options: dict[str, Any] = {"load_format": "dummy", "tokenizer": "none", "device": "cpu", "observers": ("decode_gaps",)}
    with LLM.from_engine(assemble(EngineConfig.from_options(str(tmp_path), **options), plugins=[WATCHER])) as llm:
        llm.generate([[2] * 9], progress=False)
        assert len(WATCHER.taken()) > 1
        assert WATCHER.taken() == []
        found = host_microseconds(llm, WATCHER, 2, 2 * SETTLED + 5)
    assert set(found) == {"schedule", "launch", "commit", "wait"}
    assert all(value > 0 for value in found.values())
    assert WATCHER.stats == []
    assert Watcher().stats is not WATCHER.stats


def test_a_kernel_adds_what_passes_until_it_ends() -> None:
    """Of kernels that overlap the second one what is left of it, of a gap the one behind it all; what they add is the step."""
    step = [(0.0, 2.0, "embed"), (1.0, 5.0, "product"), (4.0, 6.0, "norm"), (8.0, 9.0, "product")]
    kernels = [(begin + at, end + at, name) for at in (0.0, 10.0, 20.0) for begin, end, name in step]
    found = added(kernels, [0.0, 10.0, 20.0])
    assert found == [
        Kernel(name="product", times=2, microseconds=6),
        Kernel(name="embed", times=1, microseconds=2),
        Kernel(name="norm", times=1, microseconds=1),
    ]
