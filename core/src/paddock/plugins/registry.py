"""What is installed, as one value: who brings what, what failed and why, and lookups whose errors say the way out."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from attrs import frozen

from paddock.errors import PluginError, did_you_mean
from paddock.plugins import descriptors as d
from paddock.plugins import kinds
from paddock.plugins.collection import CHECK_PLAN, PlanCheck, instances
from paddock.plugins.conflicts import Conflict, Overridden
from paddock.plugins.kinds import Kind
from paddock.plugins.known import READ_BY_NOBODY, KnownPlugin, names_known, who_brings
from paddock.plugins.provider import BrokenPlugin, Provided, Provider, broken_by

Spec = TypeVar("Spec")


@frozen(eq=False, kw_only=True)
class Registry:
    """The host's result. Tuples are in order of plugin name; a name with two owners is in `conflicts` and raises when looked up.

    `loaded` are the plugins that work, `filtered` those PADDOCK_PLUGINS kept out, `shadowed` further copies of a distribution
    on the path, `overridden` names that `prefer` gave to another. `autoload` says whether installed plugins were looked for.
    """

    models: tuple[Provided[d.ModelSpec], ...]
    quantizations: tuple[Provided[d.QuantizationSpec], ...]
    recipes: tuple[Provided[d.RecipeSpec], ...]
    attention_backends: tuple[Provided[d.AttentionSpec], ...]
    parallel_strategies: tuple[Provided[d.ParallelSpec], ...]
    ops: tuple[Provided[d.OpSpec], ...]
    commands: tuple[Provided[d.CommandSpec], ...]
    observers: tuple[Provided[d.ObserverSpec], ...]
    checks: tuple[tuple[Provider, PlanCheck], ...]
    loaded: tuple[Provider, ...]
    filtered: tuple[Provider, ...]
    broken: tuple[BrokenPlugin, ...]
    shadowed: tuple[Provider, ...]
    overridden: tuple[Overridden, ...]
    conflicts: tuple[Conflict, ...]
    autoload: bool

    def model_for(self, architecture: str) -> Provided[d.ModelSpec]:
        """Return the model that serves an architecture of config.json; raise PluginError with the way out."""
        return self._only(kinds.MODELS, self.models, architecture)

    def quantization(self, name: str) -> Provided[d.QuantizationSpec]:
        """Return the quantisation format of that name; raise PluginError with the way out."""
        return self._only(kinds.QUANTIZATIONS, self.quantizations, name)

    def recipe(self, name: str) -> Provided[d.RecipeSpec]:
        """Return the recipe of that name; raise PluginError with the way out."""
        return self._only(kinds.RECIPES, self.recipes, name)

    def attention(self, name: str) -> Provided[d.AttentionSpec]:
        """Return the attention backend of that name; raise PluginError with the way out."""
        return self._only(kinds.ATTENTION, self.attention_backends, name)

    def parallel(self, name: str) -> Provided[d.ParallelSpec]:
        """Return the parallel strategy of that name; raise PluginError with the way out."""
        return self._only(kinds.PARALLEL, self.parallel_strategies, name)

    def parallel_for(self, axis: str) -> tuple[Provided[d.ParallelSpec], ...]:
        """Return the strategies an option (`tp`, `pp`) may size; raise PluginError for none, or for two of one name."""
        found = tuple(each for each in self.parallel_strategies if each.spec.axis == axis)
        if not found:
            raise self.missing(kinds.PARALLEL, axis)
        return tuple(self.parallel(each.spec.name) for each in found)

    def ops_for(self, op: str) -> tuple[Provided[d.OpSpec], ...]:
        """Return the implementations of an op, highest rank first; raise PluginError where nothing decides between two."""
        found = self._owned(kinds.OPS, self.ops, op)
        return tuple(sorted(found, key=lambda each: (-each.spec.rank, each.provider)))

    def command(self, name: str) -> Provided[d.CommandSpec]:
        """Return the command of that name; raise PluginError with the way out."""
        return self._only(kinds.COMMANDS, self.commands, name)

    def observer(self, name: str) -> Provided[d.ObserverSpec]:
        """Return the observer of that name; raise PluginError with the way out."""
        return self._only(kinds.OBSERVERS, self.observers, name)

    def check_plan(self, plan: Any) -> list[d.Issue]:
        """Return what every plugin says about a plan; a check that fails is itself a warning."""
        return [issue for provider, check in self.checks for issue in _checked(provider, check, plan)]

    def require_unbroken(self) -> None:
        """Raise PluginError naming every broken plugin, as strict mode asks."""
        if self.broken:
            reasons = "".join(f"\n  {each}" for each in self.broken)
            fixes = "; ".join(sorted({each.fix for each in self.broken}))
            count = f"{len(self.broken)} plugin{'s are' if len(self.broken) > 1 else ' is'} broken"
            raise PluginError(f"{count}, and strict mode takes none{reasons}", fix=fixes) from self.broken[0].error

    def missing(self, kind: Kind, name: str) -> PluginError:
        """Return the error for a name nobody brings: what is installed, what failed and why, what to do."""
        lines = [f"no plugin brings {kind.noun} {name!r}", f"installed: {', '.join(map(str, self.loaded))}"]
        lines += [f"broken: {each}" for each in self.broken]
        if self.filtered:
            lines.append(f"kept out by PADDOCK_PLUGINS: {', '.join(map(str, self.filtered))}")
        error = PluginError("\n  ".join(lines), fix=self._way_out(kind, name))
        error.__cause__ = self.broken[0].error if self.broken else None
        return error

    def _way_out(self, kind: Kind, name: str) -> str:
        available = {each for provided in getattr(self, kind.name) for each in kind.names(provided.spec)}
        known = who_brings(kind, name)
        if known is not None:
            return self._how_to_get(known)
        if kind is kinds.QUANTIZATIONS and name in READ_BY_NOBODY:
            return f"use the plain model it was made from, or one in a format that is read: {', '.join(sorted(available))}"
        advice = _nearest(name, available | set(names_known(kind)))
        for near in set(names_known(kind)) - available:
            known = who_brings(kind, near) if advice == did_you_mean(near, [near]) else None
            if known is not None:
                return f"{advice} Then: {self._how_to_get(known)}"
        return advice if advice.endswith("?") else f"{advice}; or install a plugin that brings it"

    def _how_to_get(self, known: KnownPlugin) -> str:
        if any(provider.is_called(known.distribution) for provider in self.filtered):
            return f"add {known.plugin} to PADDOCK_PLUGINS"
        for each in self.broken:
            if each.provider.is_called(known.distribution):
                return each.fix
        if any(provider.is_called(known.distribution) for provider in self.loaded):
            return f"pip install --upgrade {known.distribution}"
        return f"pip install {known.distribution}" + (
            "" if self.autoload else ", and pass it in plugins=[...] or leave autoload on"
        )

    def _only(self, kind: Kind, provided: tuple[Provided[Spec], ...], name: str) -> Provided[Spec]:
        return self._owned(kind, provided, name)[0]

    def _owned(self, kind: Kind, provided: tuple[Provided[Spec], ...], name: str) -> list[Provided[Spec]]:
        for conflict in self.conflicts:
            if (conflict.noun, conflict.name) == (kind.noun, name):
                raise conflict.error()
        found = [each for each in provided if name in kind.names(each.spec)]
        if not found:
            raise self.missing(kind, name)
        return found


def _nearest(name: str, choices: set[str]) -> str:
    """Return the advice of `did_you_mean`, for names alike before the ending that nearly all architectures share."""
    alike = difflib.get_close_matches(_family(name), [_family(each) for each in choices])
    return did_you_mean(name if alike else "", choices)


def _family(name: str) -> str:
    """Return `llama` of `LlamaForCausalLM`."""
    return re.sub(r"For[A-Z]\w*$", "", name).casefold()


def _checked(provider: Provider, check: PlanCheck, plan: Any) -> tuple[d.Issue, ...]:
    try:
        issues: tuple[d.Issue, ...] = instances(d.Issue, CHECK_PLAN, check(plan))
    except Exception as error:  # a plugin's check is its own code: that it fails must not stop a plan
        failure = broken_by(provider, CHECK_PLAN, error)
        return (d.Issue(level="warning", code="plan_check_failed", message=str(failure), fix=failure.fix),)
    return issues
