"""Two plugins that bring one name: settled by `prefer`, else remembered, and raised when somebody asks for the name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import evolve, field, frozen

from paddock.errors import OptionError, PluginError, did_you_mean
from paddock.plugins.collection import Contributions
from paddock.plugins.descriptors import ModelSpec
from paddock.plugins.kinds import KINDS, Kind
from paddock.plugins.provider import BrokenPlugin, Provided, Provider


@frozen
class Conflict:
    """A name with several owners and nothing to decide between them."""

    noun: str
    name: str
    owners: tuple[Provider, ...]

    def error(self) -> PluginError:
        """Return the error that names the owners and the setting that decides."""
        first = self.owners[0]
        plugins = {owner.plugin for owner in self.owners}
        choice = first.plugin if len(plugins) == len(self.owners) else first.distribution
        return PluginError(
            f"{self.noun} {self.name!r} has {len(self.owners)} owners: {' and '.join(map(str, self.owners))}",
            fix=f'choose one, as in prefer={{"{self.name}": "{choice}"}} or `paddock --prefer {self.name}={choice} ...`, '
            "or uninstall the other",
        )


@frozen
class Overridden:
    """A name somebody brings and `prefer` gave to another."""

    noun: str
    name: str
    provider: Provider
    by: Provider


@frozen(eq=False, kw_only=True)
class Settled:
    """Who brings what, by the name of its kind, once `prefer` has decided. `used` are the names it decided."""

    provided: Mapping[str, tuple[Provided[Any], ...]]
    conflicts: tuple[Conflict, ...]
    overridden: tuple[Overridden, ...]
    used: frozenset[str]


@frozen(eq=False)
class _Ledger:
    """What settling has found so far."""

    prefer: Mapping[str, str]
    conflicts: list[Conflict] = field(factory=list)
    overridden: list[Overridden] = field(factory=list)
    used: set[str] = field(factory=set)


def settle(contributions: Iterable[Contributions], prefer: Mapping[str, str]) -> Settled:
    """Return who brings what. A preference for a name that only its owner brings decides nothing and is honoured."""
    plugins, ledger = tuple(contributions), _Ledger(prefer)
    provided: dict[str, tuple[Provided[Any], ...]] = {}
    for kind in KINDS:
        entries = [Provided(spec, each.provider) for each in plugins for spec in each.specs.get(kind.name, ())]
        provided[kind.name] = _settle_kind(kind, entries, ledger)
    return Settled(
        provided=provided,
        conflicts=tuple(ledger.conflicts),
        overridden=tuple(ledger.overridden),
        used=frozenset(ledger.used),
    )


def refuse_unused(prefer: Mapping[str, str], settled: Settled, used: frozenset[str], broken: Iterable[BrokenPlugin]) -> None:
    """Raise OptionError for a preference that matches nothing: an explicit choice is never passed over."""
    owners: dict[str, list[str]] = {}
    for kind in KINDS:
        for each in settled.provided[kind.name]:
            for name in kind.names(each.spec):
                owners.setdefault(name, []).append(str(each.provider))
    failed = [each for each in broken if any(map(each.provider.is_called, prefer.values()))]
    for name, owner in prefer.items():
        if name in settled.used | used:
            continue
        quoted = "".join(f"\n  {each}" for each in failed if each.provider.is_called(owner))
        if name in owners:
            message = f"prefer gives {name!r} to {owner!r}, which does not bring it{quoted}"
            raise OptionError(message, fix=f"it comes from {' and '.join(owners[name])}")
        raise OptionError(f"prefer names {name!r}, which no plugin brings{quoted}", fix=did_you_mean(name, owners))


def _settle_kind(kind: Kind, entries: list[Provided[Any]], ledger: _Ledger) -> tuple[Provided[Any], ...]:
    for name in sorted({name for entry in entries for name in kind.names(entry.spec)}):
        owners = [entry for entry in entries if name in kind.names(entry.spec)]
        preferred = [entry for entry in owners if name in ledger.prefer and entry.provider.is_called(ledger.prefer[name])]
        losers = [entry for entry in owners if entry not in preferred and _clashes(kind, entry, preferred)]
        if preferred:
            ledger.used.add(name)
            ledger.overridden.extend(Overridden(kind.noun, name, entry.provider, preferred[0].provider) for entry in losers)
            entries = [kept for entry in entries if (kept := _without(entry, name) if entry in losers else entry) is not None]
            owners = [entry for entry in owners if entry not in losers]
        rivals = sorted({entry.provider for entry in owners if _clashes(kind, entry, owners)})
        if rivals:
            ledger.conflicts.append(Conflict(kind.noun, name, tuple(rivals)))
    return tuple(entries)


def _clashes(kind: Kind, entry: Provided[Any], others: Iterable[Provided[Any]]) -> bool:
    return any(other.provider != entry.provider and kind.clash(entry.spec, other.spec) for other in others)


def _without(entry: Provided[Any], name: str) -> Provided[Any] | None:
    """Return the entry no longer answering to `name`: a model keeps its other architectures."""
    if isinstance(entry.spec, ModelSpec) and entry.spec.architectures != (name,):
        rest = tuple(architecture for architecture in entry.spec.architectures if architecture != name)
        return Provided(evolve(entry.spec, architectures=rest), entry.provider)
    return None
