"""Assembling: the engine that comes out is the one the plan describes, and can be built again from the plan's JSON."""

from __future__ import annotations

import json

import pytest
from core.tests.planning.made import ComplainingPlugin

from paddock.assemble import assemble, build_engine, detect_hardware, plan
from paddock.config import EngineConfig
from paddock.errors import CheckpointError, OptionError, PlanError
from paddock.planning.serial import fingerprint, from_json, to_json
from paddock.request import Request, SamplingParams

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
PROMPT = {"prompt_token_ids": [5, 9, 2, 40]}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def folder(tmp_path):
    """Return a model folder with the config.json of a tiny Llama and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def tiny(folder, **options) -> EngineConfig:
    """Return options that make a tiny random model on the CPU."""
    return EngineConfig(
        **{"model": str(folder), "load_format": "dummy", "device": "cpu", "dtype": "float32", "max_num_seqs": 4, **options}
    )


def answer(engine) -> list[int]:
    """Return the tokens an engine gives a prompt, then close it."""
    engine.add(PROMPT, GREEDY)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    engine.close()
    return outputs[-1].token_ids


def test_an_engine_answers_and_carries_its_plan(folder):
    """A config.json and a seed suffice for an engine with random weights; its plan is the one that `plan` makes."""
    engine = assemble(tiny(folder))
    assert fingerprint(engine.plan) == fingerprint(plan(tiny(folder)))
    assert engine.max_model_len == 64
    assert len(answer(engine)) == 8


def test_the_seed_decides_random_weights(folder):
    """Equal seeds give equal models, another seed another one."""
    first, again, other = (answer(assemble(tiny(folder, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_an_engine_is_rebuilt_from_the_plans_json(folder):
    """A process that gets the plan as text builds the same engine, without looking for plugins."""

    def tokens(engine) -> list[int]:
        engine.add(Request(request_id="r", prompt_token_ids=(5, 9, 2, 40), params=GREEDY))
        made = []
        while engine.has_work:
            made += [token for update in engine.step() for token in update.token_ids]
        engine.close()
        return made

    made = plan(tiny(folder, seed=3))
    assert tokens(build_engine(from_json(to_json(made)), folder)) == answer(assemble(tiny(folder, seed=3)))


def test_the_pool_has_the_pages_of_the_plan(folder):
    """The scheduler's limits are the plan's."""
    engine = assemble(tiny(folder, kv_cache_memory_bytes=1 << 17))
    assert engine.plan.num_pages == (1 << 17) // engine.plan.ledger.page_bytes
    engine.close()


def test_a_plan_that_cannot_run_builds_nothing(folder):
    """A pool too small for one sequence is refused before any model is made."""
    with pytest.raises(PlanError, match="KV pool"):
        assemble(tiny(folder, kv_cache_memory_bytes=1))


def test_plugins_can_be_given_and_nothing_else_looked_for(folder):
    """With autoload off only what is given counts; a plugin's check is heard, and strict refuses its warning."""
    engine = assemble(tiny(folder), plugins=[llama], autoload=False)
    assert len(answer(engine)) == 8
    with pytest.raises(PlanError, match="2 layers"):
        assemble(tiny(folder, strict=True), plugins=[llama, ComplainingPlugin()], autoload=False)


def test_weights_are_required_unless_random_ones_were_asked_for(folder):
    """A folder without safetensors is an error that says so."""
    with pytest.raises(CheckpointError, match="no weights"):
        assemble(tiny(folder, load_format="auto", tokenizer="none"))


def test_cuda_that_is_not_there_is_refused(folder, monkeypatch):
    """Asking for a GPU where torch sees none is an error, not a CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="torch sees no GPU"):
        detect_hardware(tiny(folder, device="cuda"))
    assert detect_hardware(tiny(folder, device="auto")).device == "cpu"


class Properties:
    """What torch says of a GPU."""

    name, total_memory, major, minor = "NVIDIA H200", 150_000_000_000, 9, 0


@pytest.mark.parametrize(("options", "count"), [({}, 1), ({"tensor_parallel_size": 2}, 2), ({"tensor_parallel_size": 8}, 4)])
def test_as_many_gpus_are_taken_as_were_asked_for_and_are_there(folder, monkeypatch, options, count):
    """One GPU unless sizes ask for more, never more than the machine has; the fullest one says what is available."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (140_000_000_000 - index, 150_000_000_000))
    found = detect_hardware(tiny(folder, device="auto", **options))
    assert (found.device, found.name, found.count) == ("cuda", "NVIDIA H200", count)
    assert (found.compute_capability, found.bandwidth) == ((9, 0), 4.8e12)
    assert found.available_bytes == 140_000_000_000 - (count - 1)
