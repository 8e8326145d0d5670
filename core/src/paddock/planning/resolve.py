"""From what was asked, what is installed and what there is to run on: a Plan, every choice with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve, frozen

from paddock.axes import Unquantized
from paddock.config import EngineConfig
from paddock.model_config import eos_token_ids
from paddock.planning import kv_scales
from paddock.planning.agreement import say_disagreement
from paddock.planning.backends import Attention, choose_attention, choose_observers, choose_ops
from paddock.planning.fit import Sized, choose_length, fit
from paddock.planning.formats import Format, choose_format, choose_model
from paddock.planning.fp8_accumulation import choose_accumulation
from paddock.planning.fused_ops import with_chosen_parts
from paddock.planning.hardware import Hardware
from paddock.planning.int4_compute import Int4Compute, choose_int4
from paddock.planning.int4_groups import say_plain_torch
from paddock.planning.issues import with_issues
from paddock.planning.layout import Divisible, Layout, choose_layout
from paddock.planning.ledger import Room
from paddock.planning.limits import choose_batch, choose_graphs
from paddock.planning.notes import Notes
from paddock.planning.plan import Ledger, ModelFiles, Plan
from paddock.planning.quality_gate import say_failed_gate
from paddock.planning.scale_dtype import choose_scale_dtype, scale_dtype_of
from paddock.planning.weights import stored_tensors
from paddock.plugins.descriptors import ModelSpec, ObserverSpec, OpSpec
from paddock.plugins.descriptors import resolve as load
from paddock.plugins.discovery import core_version
from paddock.plugins.registry import Registry


def resolve(config: EngineConfig, registry: Registry, hardware: Hardware, files: ModelFiles, *, strict: bool = False) -> Plan:
    """Return the Plan for a model, given its small files alone; no weights, no GPU, no torch.

    What cannot be decided raises: an unknown name, a value no kernel takes, a model that cannot be cut as asked (PlanError,
    PluginError, ModelConfigError, OptionError). What is decided but cannot run (memory, GPUs, a missing plugin) is an issue of
    level `error` in the plan. `strict` (or the option) turns warnings into errors.
    """
    notes = Notes()
    decided = _decide(config, registry, hardware, files, notes)
    return with_issues(_written_down(config, hardware, files, decided, notes), registry, strict=strict or config.strict)


@frozen(kw_only=True)
class _Decided:
    """Every decision, in the values planning works with."""

    model: ModelSpec
    parsed: Any
    fmt: Format
    int4: Int4Compute
    attention: Attention
    ops: tuple[OpSpec, ...]
    fp8_accumulation: str
    observers: tuple[ObserverSpec, ...]
    layout: Layout
    sized: Sized
    max_model_len: int
    ledgers: tuple[Ledger, ...]


def _decide(config: EngineConfig, registry: Registry, hardware: Hardware, files: ModelFiles, notes: Notes) -> _Decided:
    spec, parsed = choose_model(config, registry, files, notes)
    fmt = choose_format(config, registry, hardware, files, parsed.dtype, notes)
    table, needs = load(spec.weights)(parsed), load(spec.attention)(parsed)
    fmt = evolve(fmt, scheme=choose_scale_dtype(fmt.scheme, table, files, notes))
    int4 = choose_int4(config, hardware, fmt.scheme, fmt.dtype, notes)
    attention = choose_attention(config, registry, hardware, fmt, needs, notes)
    ops = choose_ops(config, registry, hardware, fmt.dtype, notes)
    tensors = stored_tensors(table, fmt.scheme)
    accumulation = choose_accumulation(
        config.fp8_accumulation,
        tensors,
        ops,
        owners=dict(config.ops),
        rounds_weights=int4.weights_from is not None,
        scheme=fmt.scheme.name,
        notes=notes,
    )
    ops = with_chosen_parts(ops, registry, owners=dict(config.ops), notes=notes)
    kv_scales.say_scales(config, attention.kv_cache_dtype, fmt.scheme.kv_cache_dtype, files, table, notes)
    held = stored_tensors(table, Unquantized(fmt.dtype)) if fmt.online else tensors
    say_disagreement(config, fmt, held, table, files, notes)
    say_failed_gate(config, files.manifest, notes)
    model = Divisible(table=table, tensors=tensors, needs=needs, layer_cost=_layer_cost(spec, parsed))
    layout = choose_layout(config, registry, hardware, model, notes)
    say_plain_torch(fmt.scheme, table, tensors, layout.shard, ops, int4, notes)
    batch = choose_batch(config, hardware, notes)
    int4.check_reached(batch.tokens)
    sized = Sized(
        device=hardware.device,
        positions=parsed.max_model_len,
        model=model,
        fmt=fmt,
        attention=attention,
        batch=batch,
        graphs=choose_graphs(config, hardware, attention.spec, notes),
        int4=int4,
        vocab_size=parsed.vocab_size,
    )
    room = Room(
        hardware=hardware,
        utilization=config.gpu_memory_utilization,
        asked_kv_bytes=config.kv_cache_memory_bytes,
        max_num_seqs=sized.batch.sequences,
    )
    length = choose_length(config, sized, layout, room, notes)
    return _Decided(
        model=spec,
        parsed=parsed,
        fmt=fmt,
        int4=int4,
        attention=attention,
        ops=ops,
        fp8_accumulation=accumulation,
        observers=choose_observers(config, registry, notes),
        layout=layout,
        sized=sized,
        max_model_len=length,
        ledgers=fit(sized, layout, room, length, notes),
    )


def _written_down(config: EngineConfig, hardware: Hardware, files: ModelFiles, decided: _Decided, notes: Notes) -> Plan:
    return Plan(
        paddock=core_version(),
        asked=config,
        model=decided.model,
        revision=files.revision or config.revision,
        model_config=files.config,
        generation_config=files.generation_config,
        quantization_files=files.quantization_files,
        hardware=hardware,
        dtype=decided.fmt.dtype,
        quantization=decided.fmt.quantization,
        scheme=decided.fmt.scheme.name,
        fp8_inputs_from=decided.int4.inputs_from,
        fp8_weights_from=decided.int4.weights_from,
        keeps_fp8_weights=decided.int4.keeps_weights,
        scale_dtype=scale_dtype_of(decided.fmt.scheme),
        kv_cache_dtype=decided.attention.kv_cache_dtype,
        attention_compute=config.attention_compute,
        fp8_accumulation=decided.fp8_accumulation,
        attention=decided.attention.spec,
        page_size=decided.attention.page_size,
        ops=decided.ops,
        observers=decided.observers,
        parallel=decided.layout.strategies,
        tensor_parallel_size=decided.layout.sizes.tensor,
        pipeline_parallel_size=decided.layout.sizes.pipeline,
        stages=tuple((stage.first, stage.end) for stage in decided.layout.stages),
        num_layers=decided.sized.model.table.num_layers,
        vocab_size=decided.parsed.vocab_size,
        eos_token_ids=eos_token_ids(decided.parsed.eos_token_ids, files.generation_config),
        max_model_len=decided.max_model_len,
        max_num_seqs=decided.sized.batch.sequences,
        max_num_batched_tokens=decided.sized.batch.tokens,
        graphs=decided.sized.graphs,
        ledgers=decided.ledgers,
        choices=tuple(notes.choices),
        plugins=tuple(dict.fromkeys(notes.used)),
        issues=tuple(notes.issues),
    )


def _layer_cost(spec: ModelSpec, parsed: Any) -> Callable[[int], float]:
    if spec.layer_cost is None:
        return lambda _: 1.0
    cost = load(spec.layer_cost)
    return lambda i: float(cost(parsed, i))
