"""Which plugins are installed: entry points read from the metadata of every distribution, without importing any of them.

Not `importlib.metadata.entry_points`, which forgets whose entry point it was once two distributions share a name.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, EntryPoint

from attrs import frozen

from paddock.errors import PluginError
from paddock.plugins.hookspecs import GROUP
from paddock.plugins.provider import BrokenPlugin, Provider, broken_by, normalised

CORE = "paddock"
BUILTIN = "builtin"


@frozen(eq=False)
class Candidate:
    """An installed plugin, not yet imported. `requires` are its distribution's `Requires-Dist` lines."""

    provider: Provider
    entry_point: EntryPoint
    requires: tuple[str, ...]


@frozen(eq=False, kw_only=True)
class Scan:
    """What is on the path. `shadowed` are further copies of a distribution: Python imports the first, so the host reads it."""

    candidates: tuple[Candidate, ...]
    broken: tuple[BrokenPlugin, ...]
    shadowed: tuple[Provider, ...]


def core_version() -> str:
    """Return the version of the installed core; one below every release when it runs without being installed."""
    try:
        return importlib.metadata.version(CORE)
    except importlib.metadata.PackageNotFoundError:
        return "0+not.installed"


def scan(path: Iterable[str] | None = None) -> Scan:
    """Return every plugin found on `path` (the interpreter's when None), in order of plugin and distribution name."""
    candidates: dict[tuple[Provider, str], Candidate] = {}
    broken: list[BrokenPlugin] = []
    shadowed: set[Provider] = set()
    first: dict[str, Distribution] = {}
    for distribution in _distributions_with_plugins(path):
        try:
            found = tuple(_candidates(distribution))
        except Exception as error:  # anybody writes metadata: an unreadable file costs its own plugin alone
            folder = str(distribution.locate_file(""))
            broken.append(broken_by(Provider("?", f"a distribution in {folder}"), "metadata", error))
            continue
        for candidate in found:
            if first.setdefault(normalised(candidate.provider.distribution), distribution) is not distribution:
                shadowed.add(candidate.provider)
            else:
                candidates.setdefault((candidate.provider, candidate.entry_point.value), candidate)
    in_order = tuple(candidates[key] for key in sorted(candidates))
    return Scan(candidates=in_order, broken=tuple(broken), shadowed=tuple(sorted(shadowed)))


def version_mismatch(candidate: Candidate, installed: str) -> PluginError | None:
    """Return what is wrong when the plugin's distribution asks for another version of the core, else None."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in candidate.requires:
        if not line.lower().startswith(CORE):  # parsing costs more than everything else here
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            return PluginError(f"cannot read its requirement {line!r}: {error}", fix="ask its author for a repaired release")
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if normalised(requirement.name) == CORE and applies and not requirement.specifier.contains(installed, prereleases=True):
            return PluginError(
                f"it needs {CORE} {requirement.specifier}, installed is {CORE} {installed}",
                fix=f'pip install "{CORE}{requirement.specifier}", or a {candidate.provider.distribution} made for {installed}',
            )
    return None


def _distributions_with_plugins(path: Iterable[str] | None) -> Iterator[Distribution]:
    everything = importlib.metadata.distributions() if path is None else importlib.metadata.distributions(path=list(path))
    for distribution in everything:
        if GROUP in (distribution.read_text("entry_points.txt") or ""):
            yield distribution


def _candidates(distribution: Distribution) -> Iterator[Candidate]:
    stated = distribution.metadata.json
    name, version = stated.get("name"), stated.get("version")
    if not isinstance(name, str) or not isinstance(version, str):
        raise PluginError(f"its metadata says name {name!r} and version {version!r}", fix="reinstall the distribution")
    requires = tuple(distribution.requires or ())
    for entry_point in distribution.entry_points:
        if entry_point.group == GROUP:
            yield Candidate(Provider(entry_point.name, name, version), entry_point, requires)
