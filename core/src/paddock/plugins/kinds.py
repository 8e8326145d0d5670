"""The sorts of things a plugin can bring, one row each: collection, lookups, conflicts and `paddock list` all read this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from paddock.plugins import descriptors as d


@frozen
class Kind:
    """A sort of contribution. `names` are those it is asked for by; `clash` says whether two of one name exclude each other.

    `name` is the registry's attribute, `noun` what one name of it is called in a message.
    """

    name: str
    noun: str
    hook: str
    descriptor: type
    names: Callable[[Any], tuple[str, ...]]
    clash: Callable[[Any, Any], bool]


def _own_name(spec: Any) -> tuple[str, ...]:
    return (spec.name,)


def _always(one: object, other: object) -> bool:
    return True


def _serve_the_same(one: d.OpSpec, other: d.OpSpec) -> bool:
    """Return whether nothing decides between two implementations of an op: equal rank, and a device and dtype in common."""
    return one.rank == other.rank and bool(one.devices & other.devices) and bool(one.dtypes & other.dtypes)


MODELS = Kind("models", "architecture", "paddock_models", d.ModelSpec, lambda spec: spec.architectures, _always)
QUANTIZATIONS = Kind("quantizations", "quantization", "paddock_quantizations", d.QuantizationSpec, _own_name, _always)
RECIPES = Kind("recipes", "recipe", "paddock_recipes", d.RecipeSpec, _own_name, _always)
ATTENTION = Kind("attention_backends", "attention backend", "paddock_attention_backends", d.AttentionSpec, _own_name, _always)
PARALLEL = Kind("parallel_strategies", "parallel strategy", "paddock_parallel_strategies", d.ParallelSpec, _own_name, _always)
OPS = Kind("ops", "op", "paddock_ops", d.OpSpec, lambda spec: (spec.op,), _serve_the_same)
COMMANDS = Kind("commands", "command", "paddock_commands", d.CommandSpec, _own_name, _always)
OBSERVERS = Kind("observers", "observer", "paddock_observers", d.ObserverSpec, _own_name, _always)
KINDS = (MODELS, QUANTIZATIONS, RECIPES, ATTENTION, PARALLEL, OPS, COMMANDS, OBSERVERS)
