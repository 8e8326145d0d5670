"""What one run of the command line shares: the environment, the global options, and what is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import define, field

from paddock.config import Environment
from paddock.errors import OptionError

if TYPE_CHECKING:
    from paddock.plugins.registry import Registry


@define(eq=False, kw_only=True)
class Session:
    """`strict` and `prefer` are for `EngineConfig`; a command gets its session with `@click.pass_obj`."""

    environment: Environment
    strict: bool = False
    prefer: Mapping[str, str] = field(factory=dict)
    _registry: Registry | None = field(default=None, init=False)

    def registry(self) -> Registry:
        """Return what is installed, collected at the first call; broken plugins are in it even when strict."""
        if self._registry is None:
            from attrs import evolve

            from paddock.plugins.host import PluginHost

            lenient = evolve(self.environment, strict=False)
            self._registry = PluginHost(environment=lenient, prefer=self.prefer).collect()
        return self._registry


def parse_owners(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """Return an option's `NAME=OWNER` texts as a mapping; raise OptionError for one of another form or a name given twice."""
    owners: dict[str, str] = {}
    for text in texts:
        name, equals, owner = (piece.strip() for piece in text.partition("="))
        if not (name and equals and owner):
            raise OptionError(f"{option} is {text!r}", fix=f"write {option} NAME=OWNER, OWNER being a plugin or a distribution")
        if owners.get(name, owner) != owner:
            raise OptionError(f"{option} gives {name!r} to {owners[name]!r} and to {owner!r}", fix="choose one")
        owners[name] = owner
    return owners
