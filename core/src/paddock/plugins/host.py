"""The plugin host: finds plugins, loads them one by one, guarded, and returns what they bring as one Registry."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

from attrs import field, frozen

from paddock.config import Environment, read_environment
from paddock.plugins import kinds
from paddock.plugins.collection import Contributions, collect_from
from paddock.plugins.conflicts import refuse_unused, settle
from paddock.plugins.discovery import BUILTIN, CORE, Scan, core_version, scan
from paddock.plugins.provider import GIVEN, BrokenPlugin, Provider, broken_by
from paddock.plugins.registry import Registry
from paddock.plugins.selection import Selection, select

_BUILTIN_MODULE = "paddock.plugins.builtin"


def _objects(plugins: Iterable[object]) -> tuple[object, ...]:
    return tuple(plugins)


def _mapping(pairs: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, str]:
    return dict(pairs)


@frozen(eq=False, kw_only=True)
class PluginHost:
    """Where plugins come from and how they are taken.

    `plugins`: modules or instances, used as they are. `autoload`: also those installed, filtered by `environment.plugins`.
    `prefer`: a name two plugins bring, to the plugin or distribution it is taken from. `strict`: a broken plugin is an error.
    `path`: folders to look for distributions in, None for the interpreter's own path.
    """

    plugins: tuple[object, ...] = field(default=(), converter=_objects)
    autoload: bool = True
    environment: Environment = field(factory=read_environment)
    prefer: Mapping[str, str] = field(factory=dict, converter=_mapping)
    strict: bool = False
    path: tuple[str, ...] | None = None

    def collect(self) -> Registry:
        """Return what is installed and given. A plugin that fails leaves nothing behind but its entry in `broken`.

        Raises PluginError for an unknown name in PADDOCK_PLUGINS and, when strict, for a broken plugin; OptionError for a
        preference that matches nothing.
        """
        version = core_version()
        core = collect_from(importlib.import_module(_BUILTIN_MODULE), Provider(BUILTIN, CORE, version))
        found = scan(self.path) if self.autoload else Scan(candidates=(), broken=(), shadowed=())
        selection = select(found, self.environment.plugins, self.prefer, version) if self.autoload else _NOTHING
        whole, broken = _load(selection, self.plugins, frozenset(spec.op for spec in core.specs[kinds.OPS.name]))
        plugins = (core, *sorted(whole, key=lambda each: each.provider))
        settled = settle(plugins, self.prefer)
        refuse_unused(self.prefer, settled, selection.used, broken)
        registry = Registry(
            **settled.provided,
            checks=tuple((each.provider, check) for each in plugins for check in each.checks),
            loaded=tuple(each.provider for each in plugins),
            filtered=selection.filtered,
            broken=tuple(sorted(broken, key=lambda each: each.provider)),
            shadowed=found.shadowed,
            overridden=(*selection.overridden, *settled.overridden),
            conflicts=settled.conflicts,
            autoload=self.autoload,
        )
        if self.strict or self.environment.strict:
            registry.require_unbroken()
        return registry


_NOTHING = Selection(chosen=(), filtered=(), broken=(), overridden=(), used=frozenset())


def _load(selection: Selection, given: Iterable[object], ops: frozenset[str]) -> tuple[list[Contributions], list[BrokenPlugin]]:
    """Return what each plugin brings, and those that failed. An object that is installed and given counts once, as installed."""
    whole: list[Contributions] = []
    broken = list(selection.broken)
    taken: list[object] = []
    for candidate in selection.chosen:
        try:
            plugin = candidate.entry_point.load()
        except (Exception, SystemExit) as error:  # its code is not ours: whatever it raises costs this plugin alone
            broken.append(broken_by(candidate.provider, "import", error))
            continue
        taken.append(plugin)
        _collect(plugin, candidate.provider, ops, whole, broken)
    for provider, plugin in _named(given):
        if not any(plugin is each for each in taken):
            _collect(plugin, provider, ops, whole, broken)
    return whole, broken


def _collect(
    plugin: object, provider: Provider, ops: frozenset[str], whole: list[Contributions], broken: list[BrokenPlugin]
) -> None:
    try:
        whole.append(collect_from(plugin, provider, ops))
    except (Exception, SystemExit) as error:
        broken.append(broken_by(provider, "collection", error))


def _named(plugins: Iterable[object]) -> list[tuple[Provider, object]]:
    """Return each object once with a name of its own: its module's or class's, numbered from the second of that name on."""
    named: list[tuple[Provider, object]] = []
    count: dict[str, int] = {}
    for plugin in plugins:
        if any(plugin is each for _, each in named):
            continue
        name = str(getattr(plugin, "__name__", type(plugin).__name__))
        count[name] = count.get(name, 0) + 1
        named.append((Provider(name if count[name] == 1 else f"{name}#{count[name]}", GIVEN), plugin))
    return named
