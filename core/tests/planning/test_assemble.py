"""Assembling: the engine that comes out is the one the plan describes, and can be built again from the plan's JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from core.tests.planning.made import ComplainingPlugin

from paddock.assemble import _length_with_room as length_with_room
from paddock.assemble import assemble, detect_hardware, plan
from paddock.config import EngineConfig
from paddock.errors import CheckpointError, OptionError, PlanError
from paddock.execution.build import build_model, fill_model
from paddock.layers import packing
from paddock.planning import rebuild
from paddock.planning.serial import fingerprint, to_json
from paddock.plugins import resolve as imported
from paddock.request import RequestOutput, SamplingParams
from paddock.text.frontend import TextEngine

llama = pytest.importorskip("paddock_llama.plugin")

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}
CPU = torch.device("cpu")
PROMPT = {"prompt_token_ids": [5, 9, 2, 40]}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Return a model folder with the config.json of a tiny Llama and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def tiny(folder: Path, **options: Any) -> EngineConfig:
    """Return options that make a tiny random model on the CPU."""
    defaults: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "max_num_seqs": 4}
    return EngineConfig(model=str(folder), **(defaults | options))


def answer(engine: TextEngine) -> list[int]:
    """Return the tokens an engine gives a prompt, then close it."""
    engine.add(PROMPT, GREEDY)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    engine.close()
    return outputs[-1].token_ids


def test_an_engine_answers_and_carries_its_plan(folder: Path) -> None:
    """A config.json and a seed suffice for an engine with random weights; its plan is the one that `plan` makes."""
    engine = assemble(tiny(folder))
    assert fingerprint(engine.plan) == fingerprint(plan(tiny(folder)))
    assert engine.max_model_len == 64
    assert len(answer(engine)) == 8


def test_the_seed_decides_random_weights(folder: Path) -> None:
    """Equal seeds give equal models, another seed another one."""
    first, again, other = (answer(assemble(tiny(folder, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other


REBUILD = """
import importlib.metadata, sys, torch
from pathlib import Path
def scan(*_, **__):
    raise AssertionError("a worker looks for plugins")
importlib.metadata.entry_points = importlib.metadata.distributions = scan
from paddock.assemble import build_engine
from paddock.planning.serial import fingerprint, from_json
from paddock.request import Request, SamplingParams
plan = from_json(sys.stdin.read())
engine = build_engine(plan, Path(sys.argv[1]))
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
engine.add(Request(request_id="r", prompt_token_ids=(5, 9, 2, 40), params=params))
made = []
while engine.has_work:
    made += [token for update in engine.step() for token in update.token_ids]
print(fingerprint(plan), *made)
"""


def test_another_process_builds_the_engine_from_json_alone(folder: Path) -> None:
    """What crosses the process border is the plan's text and the folder's name; no entry point is looked at."""
    made = plan(tiny(folder, seed=3))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", REBUILD, str(folder)]
    worker = subprocess.run(command, input=to_json(made), capture_output=True, text=True, check=True, env=environment)
    found, *tokens = worker.stdout.split()
    assert found == fingerprint(made)
    assert [*map(int, tokens)] == answer(assemble(tiny(folder, seed=3)))


def held_bytes(model: Any) -> int:
    """Return the bytes of every weight a model keeps, each once, in whatever layout; scales of the KV cache are none."""
    owners = [owner for module in model.modules() for owner in (module, getattr(module, "method", None)) if owner is not None]
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]  # a 4-bit method has slots alone
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_mkldnn]
    tensors += [value for name, value in model.named_parameters() if not name.endswith(("k_scale", "v_scale"))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cpu_holds_the_weights_its_plan_counts(folder: Path, tied: bool, dtype: Any) -> None:
    """What the model keeps after loading, packed copies and a tied table included, is the ledger's figure to the byte."""
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 512, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(TINY | sizes))
    made = plan(tiny(folder, dtype=dtype))
    if dtype == "bfloat16" and packing.pack(torch.zeros(256, 256, dtype=torch.bfloat16)) is None:
        pytest.skip("this CPU has no kernels to pack bfloat16 for")
    model = build_model(made, imported(made.attention.factory)(rebuild.attention_needs(made), CPU), CPU)
    fill_model(made, model, folder, CPU)
    assert held_bytes(model) == made.weight_bytes


@pytest.mark.parametrize("compute", ["w4a16", "w8a8"])
def test_a_4_bit_model_holds_what_its_plan_counts(folder: Path, compute: Any) -> None:
    """With the scales that weights of large steps are divided by, where they ever are."""
    pytest.importorskip("paddock_quant_awq")
    entry = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(TINY | {"quantization_config": entry}))
    made = plan(tiny(folder, int4_compute=compute))
    model = build_model(made, imported(made.attention.factory)(rebuild.attention_needs(made), CPU), CPU)
    fill_model(made, model, folder, CPU)
    assert any(name.endswith("row_scale") for name, _ in model.named_parameters()) == (compute == "w8a8")
    assert held_bytes(model) == made.weight_bytes


def test_the_pool_has_the_pages_of_the_plan(folder: Path) -> None:
    """The scheduler's limits are the plan's."""
    engine = assemble(tiny(folder, kv_cache_memory_bytes=1 << 17))
    assert engine.plan.num_pages == (1 << 17) // engine.plan.ledger.page_bytes
    engine.close()


def test_a_plan_that_cannot_run_builds_nothing(folder: Path) -> None:
    """A pool too small for one sequence is refused before any model is made."""
    with pytest.raises(PlanError, match="KV pool"):
        assemble(tiny(folder, kv_cache_memory_bytes=1))


def test_plugins_can_be_given_and_nothing_else_looked_for(folder: Path) -> None:
    """With autoload off only what is given counts; a plugin's check is heard, and strict refuses its warning."""
    engine = assemble(tiny(folder), plugins=[llama], autoload=False)
    assert len(answer(engine)) == 8
    with pytest.raises(PlanError, match="2 layers"):
        assemble(tiny(folder, strict=True), plugins=[llama, ComplainingPlugin()], autoload=False)


def test_weights_are_required_unless_random_ones_were_asked_for(folder: Path) -> None:
    """A folder without safetensors is an error that says so."""
    with pytest.raises(CheckpointError, match="no weights"):
        assemble(tiny(folder, load_format="auto", tokenizer="none"))


@pytest.mark.parametrize(("built_for", "fix"), [(None, "install a torch built for CUDA"), ("13.0", "check the driver")])
def test_cuda_that_is_not_there_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, built_for: str | None, fix: str
) -> None:
    """Asking for a GPU where torch sees none is an error, not a CPU, and says whether torch or the driver is to blame."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", built_for)
    with pytest.raises(OptionError, match="torch sees no GPU") as caught:
        detect_hardware(tiny(folder, device="cuda"))
    assert fix in caught.value.fix
    assert detect_hardware(tiny(folder, device="auto")).device == "cpu"


class Properties:
    """What torch says of a GPU."""

    name, total_memory, major, minor = "NVIDIA H200", 150_000_000_000, 9, 0


@pytest.mark.parametrize(("options", "count"), [({}, 1), ({"tensor_parallel_size": 2}, 2), ({"tensor_parallel_size": 8}, 4)])
def test_as_many_gpus_are_taken_as_were_asked_for_and_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], count: int
) -> None:
    """One GPU unless sizes ask for more, never more than the machine has; the fullest one says what is available."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (140_000_000_000 - index, 150_000_000_000))
    found = detect_hardware(tiny(folder, device="auto", **options))
    assert (found.device, found.name, found.count) == ("cuda", "NVIDIA H200", count)
    assert (found.compute_capability, found.bandwidth) == ((9, 0), 4.8e12)
    assert found.available_bytes == 140_000_000_000 - (count - 1)


def test_an_automatic_length_shrinks_to_the_pages_there_really_are(folder: Path) -> None:
    """Fewer pages than planned shorten a length nobody asked for, never one that was asked for."""
    automatic, asked = plan(tiny(folder)), plan(tiny(folder, max_model_len=64))
    enough, few = automatic.max_model_len // automatic.page_size, 2
    assert length_with_room(automatic, enough) == automatic.max_model_len
    assert length_with_room(automatic, few) == few * automatic.page_size
    assert length_with_room(asked, few) == 64
