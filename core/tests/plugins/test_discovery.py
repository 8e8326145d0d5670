"""Finding plugins without importing them."""

from __future__ import annotations

import sys

from core.tests.plugins.made import Site, model_source

from paddock.plugins.discovery import scan
from paddock.plugins.provider import Provider


def test_a_plugin_is_found_with_its_distribution_and_version(site: Site) -> None:
    """Provenance comes from the metadata."""
    site.install("acme-cow", model_source("CowForCausalLM"), version="2.1", plugin="cow")
    registry = site.collect()
    assert registry.model_for("CowForCausalLM").provider == Provider("cow", "acme-cow", "2.1")


def test_scanning_imports_nothing(site: Site) -> None:
    """Metadata alone says which plugins there are."""
    site.install("acme", "raise RuntimeError", module="acme_never_imported")
    assert [candidate.provider.plugin for candidate in scan(site.path).candidates] == ["acme"]
    assert "acme_never_imported" not in sys.modules


def test_the_order_on_the_path_does_not_matter(site: Site) -> None:
    """Plugins come in order of their names."""
    for name, folder in (("zebra", "site"), ("ant", "later"), ("mole", "site")):
        site.install(name, at=folder)
    forward, backward = scan(site.path), scan(reversed(site.path))
    assert [candidate.provider.plugin for candidate in forward.candidates] == ["ant", "mole", "zebra"]
    assert [each.provider for each in forward.candidates] == [each.provider for each in backward.candidates]


def test_the_first_copy_of_a_distribution_shadows_the_others(site: Site) -> None:
    """Python imports the first copy on the path, so its metadata counts; the other is remembered."""
    site.install("acme", model_source("New"), version="2.0")
    site.install("Acme", model_source("Old"), version="1.0", at="later")
    registry = site.collect()
    assert [str(each.provider) for each in registry.models] == ["acme 2.0 (plugin 'acme')"]
    assert [provider.version for provider in registry.shadowed] == ["1.0"]
    assert not registry.broken


def test_unreadable_metadata_costs_its_own_plugin_alone(site: Site) -> None:
    """A distribution without a name is broken; the next one works."""
    (site.install("acme") / "METADATA").write_text("Version: 1\n\n")
    site.install("good", model_source("Good"))
    registry = site.collect()
    assert registry.model_for("Good")
    assert registry.broken[0].stage == "metadata"
    assert str(site.path[0]) in str(registry.broken[0])


def test_other_entry_point_groups_are_left_alone(site: Site) -> None:
    """Only paddock.plugins.v1 is read."""
    (site.install("acme") / "entry_points.txt").write_text("[console_scripts]\nacme = acme:main\n[paddock.plugins.v0]\na = a\n")
    assert not scan(site.path).candidates


def test_the_same_entry_point_written_twice_counts_once(site: Site) -> None:
    """A repeated line in the metadata is one plugin."""
    metadata = site.install("acme", model_source("Acme")) / "entry_points.txt"
    metadata.write_text(metadata.read_text() + metadata.read_text().splitlines()[1] + "\n")
    assert len(site.collect().models) == 1
