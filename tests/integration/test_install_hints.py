"""What errors say to install brings what they promise."""

from __future__ import annotations

import pytest

from paddock.plugins.host import PluginHost
from paddock.plugins.kinds import KINDS
from paddock.plugins.known import KNOWN, KnownPlugin
from tests.policy.source_tree import DISTRIBUTIONS

OURS = [
    known for known in KNOWN if known.distribution in {f"paddock-{folder.name.replace('_', '-')}" for folder in DISTRIBUTIONS}
]


def test_every_plugin_of_the_workspace_is_hinted_at() -> None:
    """Each has a row in the table of known plugins."""
    assert len(OURS) == len(DISTRIBUTIONS) - 1


@pytest.mark.parametrize("known", OURS, ids=lambda known: known.plugin)
def test_a_hint_names_what_the_distribution_brings_no_more_and_no_less(known: KnownPlugin) -> None:
    """Nobody installs a plugin on our word and finds that it lacks the name, or misses one that he could have had."""
    registry = PluginHost().collect()
    brings = {
        kind.name: {
            name
            for each in getattr(registry, kind.name)
            if (each.provider.plugin, each.provider.distribution) == (known.plugin, known.distribution)
            for name in kind.names(each.spec)
        }
        for kind in KINDS
    }
    assert {kind: names for kind, names in brings.items() if names} == {kind: set(names) for kind, names in known.brings.items()}
