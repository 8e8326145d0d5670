"""What is installed: descriptors, hooks, and the host that collects them."""

from paddock.plugins.descriptors import (
    AttentionNeeds,
    AttentionSpec,
    CheckpointFacts,
    CommandSpec,
    Issue,
    ModelSpec,
    ObserverSpec,
    OpSpec,
    ParallelSpec,
    QuantizationSpec,
    RecipeSpec,
    resolve,
)
from paddock.plugins.hookspecs import hookimpl

__all__ = [
    "AttentionNeeds",
    "AttentionSpec",
    "CheckpointFacts",
    "CommandSpec",
    "Issue",
    "ModelSpec",
    "ObserverSpec",
    "OpSpec",
    "ParallelSpec",
    "QuantizationSpec",
    "RecipeSpec",
    "hookimpl",
    "resolve",
]
