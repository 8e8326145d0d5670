"""What errors say to install brings what they promise."""

from __future__ import annotations

import pytest

from paddock.plugins.discovery import CORE
from paddock.plugins.host import PluginHost
from paddock.plugins.kinds import KINDS, Kind
from paddock.plugins.known import KNOWN, KnownPlugin
from paddock.plugins.registry import Registry
from tests.policy.source_tree import DISTRIBUTIONS

OURS = [
    known for known in KNOWN if known.distribution in {f"paddock-{folder.name.replace('_', '-')}" for folder in DISTRIBUTIONS}
]


def test_every_plugin_of_the_workspace_is_hinted_at() -> None:
    """Each has a row in the table of known plugins."""
    assert len(OURS) == len(DISTRIBUTIONS) - 1


@pytest.mark.parametrize("known", OURS, ids=lambda known: known.plugin)
def test_a_hint_names_what_the_distribution_brings_no_more_and_no_less(known: KnownPlugin) -> None:
    """Nobody installs a plugin on our word and finds that it lacks the name, or misses one that he could have had.

    What the core brings too, such as every op, is missing nowhere and needs no hint.
    """
    registry = PluginHost().collect()
    brings = {kind.name: _brought(registry, kind, known.distribution) - _brought(registry, kind, CORE) for kind in KINDS}
    assert {kind: names for kind, names in brings.items() if names} == {kind: set(names) for kind, names in known.brings.items()}


def _brought(registry: Registry, kind: Kind, distribution: str) -> set[str]:
    provided = (each for each in getattr(registry, kind.name) if each.provider.distribution == distribution)
    return {name for each in provided for name in kind.names(each.spec)}
