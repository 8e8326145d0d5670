"""A plan is a value: JSON both ways, and a fingerprint of what runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attrs import evolve
from core.tests.planning.made import MadePlugin, ParallelPlugin, cpu, gpus, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.errors import ModelConfigError, PlanError
from paddock.planning import rebuild
from paddock.planning.report import as_report
from paddock.planning.serial import fingerprint, from_json, to_json
from paddock.plugins import Issue

GROUPED = {"quantization_config": {"quant_method": "grouped"}}

options = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["auto", "bfloat16", "float16"]),
        "max_model_len": st.integers(1, 256),
        "max_num_seqs": st.integers(1, 512),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "bfloat16", "float16"]),
        "kv_cache_memory_bytes": st.integers(1, 1 << 34),
        "enforce_eager": st.booleans(),
        "seed": st.integers(0, 1 << 40),
        "prefer": st.just({}),
        "ops": st.just({"gelu": "paddock"}),
        "ignore_config_keys": st.lists(st.text(max_size=5), max_size=2),
        "tokenizer": st.text(max_size=10),
    },
)
hardware = st.one_of(st.builds(gpus, st.integers(1, 4), gib=st.floats(0.1, 200)), st.builds(cpu, gib=st.floats(0.1, 200)))


@settings(max_examples=40)
@given(raw=st.sampled_from([{}, GROUPED, {"tied": True, "note": "öß\u2028"}]), hardware=hardware, options=options)
def test_a_plan_is_read_back_as_it_was(raw: dict[str, Any], hardware: Any, options: dict[str, Any]) -> None:
    """Whatever was asked, JSON holds the whole plan, and reading it back gives an equal one with the same text."""
    plan = planned(raw, hardware, plugins=[ParallelPlugin()], **options)
    text = to_json(plan)
    again = from_json(text)
    assert again == plan
    assert to_json(again) == text
    assert fingerprint(again) == fingerprint(plan)


def test_what_does_not_change_the_run_does_not_change_the_fingerprint() -> None:
    """Free memory, issues, explanations and the way a value was asked for do not count."""
    plan = planned()
    assert fingerprint(planned(dtype="bfloat16")) == fingerprint(plan)
    assert fingerprint(planned({}, evolve(gpus(), available_bytes=1 << 34))) == fingerprint(plan)
    assert fingerprint(evolve(plan, choices=(), issues=(Issue(level="info", code="x", message="y"),))) == fingerprint(plan)


@pytest.mark.parametrize(
    ("raw", "hardware", "options"),
    [
        ({}, gpus(), {"dtype": "float16"}),
        ({"positions": 128}, gpus(), {}),
        ({}, gpus(2), {}),
        ({}, gpus(), {"attention_backend": "torch"}),
        ({}, gpus(), {"kv_cache_dtype": "fp8"}),
        ({}, gpus(), {"load_format": "dummy"}),
        ({}, gpus(), {"enforce_eager": True}),
        ({}, gpus(), {"revision": "abc"}),
    ],
)
def test_what_changes_the_run_changes_the_fingerprint(raw: dict[str, Any], hardware: Any, options: dict[str, Any]) -> None:
    """Another dtype, shape, GPU count, backend, KV dtype, set of weights or revision is another engine."""
    assert fingerprint(planned(raw, hardware, **options)) != fingerprint(planned())


def test_a_seed_counts_where_it_draws_the_weights() -> None:
    """Random weights of another seed are another model; loaded ones are the same whatever is sampled."""
    prints = [fingerprint(planned(seed=seed, load_format=kind)) for kind in ("dummy", "auto") for seed in (1, 2)]
    assert prints[0] != prints[1]
    assert prints[2] == prints[3]


def test_a_fingerprint_is_a_sha256_and_the_same_in_every_process() -> None:
    """Sets are sorted, so hash randomisation does not reach it."""
    assert len(bytes.fromhex(fingerprint(planned()))) == 32
    assert '"devices":["cpu","cuda"]' in to_json(planned({}, cpu()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"surprise": 1}', "null"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    """Anything but a whole plan of this version is an error with a way out."""
    with pytest.raises(PlanError, match="not a plan of this version"):
        from_json(text)


def test_an_unknown_or_missing_field_is_refused() -> None:
    """A plan of another version is not guessed at."""
    values = json.loads(to_json(planned()))
    with pytest.raises(PlanError):
        from_json(json.dumps(values | {"new_field": 1}))
    values.pop("page_size")
    with pytest.raises(PlanError):
        from_json(json.dumps(values))


def test_a_worker_rebuilds_what_the_plan_was_computed_from() -> None:
    """From JSON alone: config, weight table, attention, scheme, shards and layers."""
    plan = planned(GROUPED, gpus(4), plugins=[ParallelPlugin()], tensor_parallel_size=2, pipeline_parallel_size=2)
    worker = from_json(to_json(plan))
    assert rebuild.parsed_config(worker).num_layers == 4
    assert rebuild.weight_table(worker).num_layers == 4
    assert rebuild.attention_needs(worker).head_dim == 16
    assert rebuild.scheme(worker).name == "grouped"
    assert rebuild.shard(worker, 1).world == 2
    assert rebuild.shard(worker, 1).rank == 1
    assert [*rebuild.layers(worker, 1)] == [2, 3]


def test_keys_that_the_user_lets_pass_reach_the_format() -> None:
    """When the plan is made, and in the worker that reads it."""
    entry = {"quantization_config": {"quant_method": "grouped", "novelty": 1}}
    with pytest.raises(ModelConfigError) as caught:
        planned(entry)
    assert caught.value.fix.endswith("ignore_config_keys=quantization_config.novelty")
    plan = planned(entry, ignore_config_keys=["quantization_config.novelty"])
    assert rebuild.scheme(from_json(to_json(plan))).name == plan.scheme == "grouped"


def test_a_plan_names_its_plugins_with_versions() -> None:
    """Every plugin the plan relies on is in it, once for each role."""
    used = {(each.role, each.name): each for each in planned(GROUPED).plugins}
    assert used["model", "made"].plugin
    assert used["op", "gelu"].version
    assert len(used) == len(planned(GROUPED).plugins)
    assert MadePlugin.__name__ in used["model", "made"].plugin


def test_the_report_has_the_figures_and_the_plan() -> None:
    """`--json` says first whether it runs and what fits, then everything; and it is JSON."""
    plan = planned(max_model_len=128)
    report = json.loads(json.dumps(as_report(plan)))
    assert report["runnable"] is True
    assert report["kv_tokens"] == plan.kv_tokens
    assert from_json(json.dumps(report["plan"])) == plan
