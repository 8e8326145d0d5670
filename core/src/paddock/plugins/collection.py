"""What one plugin brings: its hooks checked against the specs, called one by one, and their results checked."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

import pluggy
from attrs import frozen

from paddock.errors import PluginError, did_you_mean
from paddock.plugins import hookspecs, kinds
from paddock.plugins.descriptors import Issue
from paddock.plugins.hookspecs import PROJECT
from paddock.plugins.kinds import KINDS, Kind
from paddock.plugins.provider import Provider

CHECK_PLAN = "paddock_check_plan"
HOOKS = tuple(sorted(name for name in vars(hookspecs) if name.startswith(f"{PROJECT}_")))
_ORDERING = {"hookwrapper": "wraps", "wrapper": "wraps", "tryfirst": "wants to run first", "trylast": "wants to run last"}
PlanCheck = Callable[[Any], Iterable[Issue]]


@frozen(eq=False)
class Contributions:
    """The descriptors of one plugin, by the name of their kind, and its plan checks."""

    provider: Provider
    specs: Mapping[str, tuple[Any, ...]]
    checks: tuple[PlanCheck, ...] = ()


def collect_from(plugin: object, provider: Provider, ops: frozenset[str] | None = None) -> Contributions:
    """Return what `plugin` brings. `ops` are the ops the core defines; None takes any, for the core itself.

    Raises PluginError for what this module refuses, and whatever the plugin's own code raises.
    """
    implementations = _implementations(plugin)
    by_hook = {kind.hook: kind for kind in KINDS}
    specs: dict[str, tuple[Any, ...]] = {}
    checks: list[PlanCheck] = []
    for hook, function in implementations:
        if hook == CHECK_PLAN:
            checks.append(function)
        elif hook in by_hook:  # else an optional hook of another version of the core
            kind = by_hook[hook]
            specs[kind.name] = specs.get(kind.name, ()) + instances(kind.descriptor, hook, function())
    for kind in KINDS:
        _refuse_twice(kind, specs.get(kind.name, ()))
    for spec in specs.get(kinds.OPS.name, ()):
        if ops is not None and spec.op not in ops:
            raise PluginError(f"it implements an op {spec.op!r} that the core does not define", fix=did_you_mean(spec.op, ops))
    return Contributions(provider, specs, tuple(checks))


def instances(descriptor: type, hook: str, result: Any) -> tuple[Any, ...]:
    """Return a hook's result as a tuple; raise PluginError where it is no iterable of `descriptor`."""
    wanted = descriptor.__name__
    if isinstance(result, descriptor):
        raise PluginError(f"{hook} returned one {wanted}", fix=f"return a list: [{wanted}(...)]")
    if not isinstance(result, Iterable):
        raise PluginError(f"{hook} returned {_shown(result)}", fix=f"return a list of {wanted}")
    items = tuple(result)
    for item in items:
        if not isinstance(item, descriptor):
            raise PluginError(
                f"{hook} returned {_shown(item)} among its results", fix=f"return a list of {wanted} and of nothing else"
            )
    return items


def _implementations(plugin: object) -> list[tuple[str, Callable[..., Any]]]:
    """Return (hook, function) for every implementation, in order of hook and function name."""
    if isinstance(plugin, (type, str)):
        raise PluginError(f"{plugin!r} is no plugin", fix="give a module or an instance with functions marked @hookimpl")
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is not None:
            _refuse_unknown_or_ordered(options.get("specname") or attribute, dict(options))
    _refuse_unmarked(plugin)
    try:
        manager.register(plugin)
    except pluggy.PluginValidationError as error:
        raise PluginError(" ".join(str(error).split()), fix="take only arguments that the hook names") from error
    callers = manager.get_hookcallers(plugin) or ()
    found = [(caller.name, implementation) for caller in callers for implementation in caller.get_hookimpls()]
    found.sort(key=lambda pair: (pair[0], pair[1].function.__name__))
    return [(name, _opted_in(implementation)) for name, implementation in found]


def _opted_in(implementation: pluggy.HookImpl) -> Callable[..., Any]:
    """Return a function of the hook's arguments that passes on those the implementation takes."""
    if implementation.argnames:
        return implementation.function
    function = implementation.function
    return lambda *_: function()


def _refuse_unknown_or_ordered(hook: str, options: Mapping[str, Any]) -> None:
    if hook not in HOOKS and not options.get("optionalhook"):
        raise PluginError(f"it implements a hook {hook!r} that does not exist", fix=did_you_mean(hook, HOOKS))
    for option, wish in _ORDERING.items():
        if options.get(option):
            raise PluginError(f"its {hook} {wish} ({option}=True)", fix="use a plain @hookimpl: order has no meaning")


def _refuse_unmarked(plugin: object) -> None:
    """Raise for a function named as a hook that lacks the marker: it would be passed over in silence."""
    for name in HOOKS:
        function = getattr(plugin, name, None)
        if isinstance(function, (types.FunctionType, types.MethodType)) and not hasattr(function, f"{PROJECT}_impl"):
            raise PluginError(f"its {name} is not marked as a hook", fix="decorate it with @paddock.plugins.hookimpl")


def _refuse_twice(kind: Kind, specs: tuple[Any, ...]) -> None:
    for one, other in combinations(specs, 2):
        for name in sorted(set(kind.names(one)) & set(kind.names(other))):
            if kind.clash(one, other):
                raise PluginError(f"it brings {kind.noun} {name!r} twice", fix="declare it once")
    for spec in specs:
        names = kind.names(spec)
        if len(set(names)) != len(names):
            raise PluginError(f"it names one {kind.noun} twice: {', '.join(names)}", fix="declare it once")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
