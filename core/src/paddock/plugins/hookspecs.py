"""Every hook Paddock calls. Each returns an iterable of frozen descriptors; none is called while tokens are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from paddock.plugins import descriptors as d

PROJECT = "paddock"
GROUP = "paddock.plugins.v1"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def paddock_models() -> Iterable[d.ModelSpec]:
    """Return the model families this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_quantizations() -> Iterable[d.QuantizationSpec]:
    """Return the quantised checkpoint formats this plugin reads."""
    raise NotImplementedError


@hookspec
def paddock_recipes() -> Iterable[d.RecipeSpec]:
    """Return the ways to make a quantised checkpoint this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_attention_backends() -> Iterable[d.AttentionSpec]:
    """Return the attention backends this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_parallel_strategies() -> Iterable[d.ParallelSpec]:
    """Return the ways of spreading a model over GPUs this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_ops() -> Iterable[d.OpSpec]:
    """Return the op implementations this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_commands() -> Iterable[d.CommandSpec]:
    """Return the CLI commands this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_observers() -> Iterable[d.ObserverSpec]:
    """Return the step observers this plugin adds."""
    raise NotImplementedError


@hookspec
def paddock_check_plan(plan: Any) -> Iterable[d.Issue]:
    """Return what this plugin finds wrong with, or worth saying about, a `planning.plan.Plan`."""
    raise NotImplementedError
