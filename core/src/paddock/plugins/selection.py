"""Which installed plugins may load: the filter, names two distributions share, the version of the core they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from attrs import frozen

from paddock.errors import PluginError, did_you_mean
from paddock.plugins.conflicts import Conflict, Overridden
from paddock.plugins.discovery import BUILTIN, CORE, Candidate, Scan, version_mismatch
from paddock.plugins.known import plugin_called
from paddock.plugins.provider import BrokenPlugin, Provider, broken_by, normalised

NOUN = "plugin"


@frozen(eq=False, kw_only=True)
class Selection:
    """What to import, and what became of the rest. `used` are the names whose owner `prefer` settled."""

    chosen: tuple[Candidate, ...]
    filtered: tuple[Provider, ...]
    broken: tuple[BrokenPlugin, ...]
    overridden: tuple[Overridden, ...]
    used: frozenset[str]


def select(found: Scan, allowed: tuple[str, ...] | None, prefer: Mapping[str, str], installed: str) -> Selection:
    """Return which candidates to import. `allowed` None is all of them; raise PluginError for an allowed name nobody has."""
    candidates = [candidate for candidate in found.candidates if normalised(candidate.provider.distribution) != CORE]
    _refuse_unknown(allowed or (), candidates)
    filtered = [each for each in candidates if allowed is not None and not any(map(each.provider.is_called, allowed))]
    chosen: list[Candidate] = []
    broken = list(found.broken)
    overridden: list[Overridden] = []
    used: set[str] = set()
    remaining = [candidate for candidate in candidates if candidate not in filtered]
    for name, group in groupby(remaining, key=lambda candidate: candidate.provider.plugin):
        namesakes = list(group)
        preferred = [each for each in namesakes if name in prefer and each.provider.is_called(prefer[name])]
        if 0 < len(preferred) < len(namesakes):
            used.add(name)
            losers = [each for each in namesakes if each not in preferred]
            overridden += [Overridden(NOUN, name, each.provider, preferred[0].provider) for each in losers]
            namesakes = preferred
        for candidate in namesakes:
            error = _refusal(candidate, namesakes, installed)
            if error is None:
                chosen.append(candidate)
            else:
                broken.append(broken_by(candidate.provider, "selection", error))
    return Selection(
        chosen=tuple(chosen),
        filtered=tuple(candidate.provider for candidate in filtered),
        broken=tuple(broken),
        overridden=tuple(overridden),
        used=frozenset(used),
    )


def _refusal(candidate: Candidate, namesakes: list[Candidate], installed: str) -> PluginError | None:
    if candidate.provider.plugin == BUILTIN:
        return PluginError(f"the plugin name {BUILTIN!r} belongs to {CORE}", fix="ask its author to rename it, or uninstall it")
    if len(namesakes) > 1:
        return Conflict(NOUN, candidate.provider.plugin, tuple(each.provider for each in namesakes)).error()
    return version_mismatch(candidate, installed)


def _refuse_unknown(allowed: tuple[str, ...], candidates: list[Candidate]) -> None:
    core = Provider(BUILTIN, CORE)
    for name in allowed:
        if core.is_called(name) or any(candidate.provider.is_called(name) for candidate in candidates):
            continue
        known = plugin_called(name)
        installed = [BUILTIN, *(candidate.provider.plugin for candidate in candidates)]
        way_out = f"pip install {known.distribution}" if known else did_you_mean(name, installed)
        raise PluginError(f"PADDOCK_PLUGINS names {name!r}: no such plugin is installed", fix=way_out)
