"""What a worker makes of a Plan: the values it was computed from, without scanning for plugins."""

from __future__ import annotations

from typing import Any

from paddock.axes import WHOLE, KeepsScales, RoundsInputs, Scheme, Shard, Unquantized, WeightTable
from paddock.errors import PlanError
from paddock.planning.layout import USUAL_CUTS
from paddock.planning.plan import Plan
from paddock.plugins.descriptors import AttentionNeeds, CheckpointFacts, resolve


def parsed_config(plan: Plan) -> Any:
    """Return the model family's own config."""
    return resolve(plan.model.parse_config)(plan.model_config, plan.asked.ignore_config_keys)


def weight_table(plan: Plan) -> WeightTable:
    """Return every parameter of the model."""
    table: WeightTable = resolve(plan.model.weights)(parsed_config(plan))
    return table


def attention_needs(plan: Plan) -> AttentionNeeds:
    """Return what the model asks of attention, over all ranks."""
    needs: AttentionNeeds = resolve(plan.model.attention)(parsed_config(plan))
    return needs


def scheme(plan: Plan) -> Scheme:
    """Return how the checkpoint stores its linears."""
    if plan.quantization is None:
        return Unquantized(plan.dtype)
    facts = CheckpointFacts(
        config=plan.model_config,
        dtype=plan.dtype,
        files=plan.quantization_files,
        ignored_keys=plan.asked.ignore_config_keys,
    )
    found: Scheme | None = resolve(plan.quantization.detect)(facts)
    if found is None and plan.quantization.online is not None:
        found = resolve(plan.quantization.online)(facts)
    if found is None:
        raise PlanError(
            f"the plan says {plan.quantization.name}, but the installed plugin does not recognise the checkpoint",
            fix="make the plan with the versions it will run with",
        )
    if isinstance(found, KeepsScales) and plan.scale_dtype is not None:
        found = found.with_scale_dtype(plan.scale_dtype)
    if not isinstance(found, RoundsInputs):
        return found
    return found.with_fp8_from(plan.fp8_inputs_from, plan.fp8_weights_from, keep=plan.keeps_fp8_weights)


def shard(plan: Plan, tensor_rank: int = 0) -> Shard:
    """Return what a tensor-parallel rank holds of each part."""
    if plan.tensor_parallel_size == 1:
        return WHOLE
    cuts = next((spec.cuts for spec in plan.parallel if spec.axis == "tp"), USUAL_CUTS)
    return Shard(tensor_rank, plan.tensor_parallel_size, cuts)


def layers(plan: Plan, stage: int = 0) -> range:
    """Return the indices of the layers a pipeline stage holds."""
    return range(*plan.stages[stage])
