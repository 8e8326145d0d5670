"""Which plugins may load: the filter, versions, and names two distributions share."""

from __future__ import annotations

import sys

import pytest
from core.tests.plugins.made import Site, model_source

from paddock.errors import OptionError, PluginError
from paddock.plugins.discovery import core_version, scan, version_mismatch

NEVER = "raise RuntimeError('imported')"


def test_every_plugin_loads_unless_some_are_named(site: Site) -> None:
    """Without a filter all load."""
    site.install("one", model_source("One"))
    site.install("two", model_source("Two"))
    assert [provider.plugin for provider in site.collect().loaded] == ["builtin", "one", "two"]


def test_a_plugin_that_is_not_named_is_recorded_and_never_imported(site: Site) -> None:
    """The filter works before import."""
    site.install("one", model_source("One"))
    site.install("two", NEVER, module="two_filtered_out")
    registry = site.collect(only=("one",))
    assert [provider.plugin for provider in registry.filtered] == ["two"]
    assert not registry.broken
    assert "two_filtered_out" not in sys.modules


def test_an_empty_filter_leaves_the_core_alone(site: Site) -> None:
    """No installed plugin loads; the core's own always does."""
    site.install("one", NEVER)
    assert [provider.plugin for provider in site.collect(only=()).loaded] == ["builtin"]


@pytest.mark.parametrize("name", ["quant-fp8", "quant_fp8", "acme-quant-fp8", "Acme.Quant_FP8"])
def test_a_filter_takes_plugin_and_distribution_names_as_packaging_compares_them(site: Site, name: str) -> None:
    """Dashes, underscores, dots and case do not matter."""
    site.install("acme-quant-fp8", model_source("One"), plugin="quant-fp8")
    assert [provider.plugin for provider in site.collect(only=(name,)).loaded] == ["builtin", "quant-fp8"]


def test_an_unknown_name_in_the_filter_is_an_error_with_the_nearest(site: Site) -> None:
    """A misspelt name never silently loads less."""
    site.install("giraffe")
    with pytest.raises(PluginError, match=r"PADDOCK_PLUGINS names 'girafe'(.|\n)*did you mean 'giraffe'\?"):
        site.collect(only=("girafe",))


def test_an_absent_first_party_name_in_the_filter_says_what_to_install(site: Site) -> None:
    """The host knows which distribution would bring it."""
    with pytest.raises(PluginError, match="pip install paddock-triton"):
        site.collect(only=("triton",))


def test_the_core_may_be_named_in_the_filter(site: Site) -> None:
    """Naming what always loads changes nothing."""
    assert site.collect(only=("builtin",)).loaded


@pytest.mark.parametrize("requirement", ["paddock>=99", "paddock<0.0.1", 'Paddock (<0.0.1) ; python_version > "3"'])
def test_a_plugin_made_for_another_version_is_broken_before_import(site: Site, requirement: str) -> None:
    """Both versions are named and its code never runs."""
    site.install("acme", NEVER, requires=["attrs", requirement], module="acme_wrong_version")
    (broken,) = site.collect().broken
    assert "it needs paddock" in broken.reason
    assert f"installed is paddock {core_version()}" in broken.reason
    assert "acme_wrong_version" not in sys.modules


@pytest.mark.parametrize(
    "requires",
    [[], ["paddock"], ["paddock>=0.1,<0.2"], ["paddock>=99; extra == 'future'"], ["paddock-llama>=99", "paddocks>=99"]],
)
def test_a_plugin_whose_requirement_holds_loads(site: Site, requires: list[str]) -> None:
    """No requirement, one that holds, one that does not apply, and those on others are all fine."""
    site.install("acme", model_source("One"), requires=requires)
    assert site.collect().model_for("One")


@pytest.mark.parametrize(("installed", "fits"), [("0.2.0rc1", True), ("0.2.0.dev3+local", True), ("1.0", False)])
def test_a_pre_release_of_the_core_counts_by_its_number(site: Site, installed: str, fits: bool) -> None:
    """Who tries a release candidate keeps the plugins."""
    site.install("acme", requires=["paddock>=0.1,<1"])
    (candidate,) = scan(site.path).candidates
    assert (version_mismatch(candidate, installed) is None) == fits


def test_an_unreadable_requirement_breaks_its_plugin(site: Site) -> None:
    """The line is quoted."""
    site.install("acme", NEVER, requires=["paddock>>1"])
    assert "paddock>>1" in site.collect().broken[0].reason


def test_two_distributions_of_one_plugin_name_are_both_refused_and_named(site: Site) -> None:
    """Neither is imported, since nothing says which is meant."""
    site.install("acme", NEVER, plugin="cow")
    site.install("zoo", NEVER, plugin="cow", version="3.0")
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("Cow")
    assert "plugin 'cow' has 2 owners: acme 1.0 (plugin 'cow') and zoo 3.0 (plugin 'cow')" in str(raised.value)
    assert 'prefer={"cow": "acme"}' in site.collect().broken[0].fix


def test_prefer_decides_between_two_distributions_of_one_plugin_name(site: Site) -> None:
    """The other is recorded and never imported."""
    site.install("acme", NEVER, plugin="cow")
    site.install("zoo", model_source("Cow"), plugin="cow")
    registry = site.collect(prefer={"cow": "zoo"}, strict=True)
    assert registry.model_for("Cow").provider.distribution == "zoo"
    assert [each.provider.distribution for each in registry.overridden] == ["acme"]


def test_the_filter_decides_between_two_distributions_of_one_plugin_name(site: Site) -> None:
    """Naming the distribution is enough."""
    site.install("acme", NEVER, plugin="cow")
    site.install("zoo", model_source("Cow"), plugin="cow")
    assert site.collect(only=("zoo",), strict=True).model_for("Cow")


def test_preferring_a_third_distribution_is_an_error(site: Site) -> None:
    """A choice that matches nothing is never passed over."""
    site.install("acme", NEVER, plugin="cow")
    site.install("zoo", NEVER, plugin="cow")
    with pytest.raises(OptionError, match="'cow'"):
        site.collect(prefer={"cow": "barn"})


def test_the_name_of_the_core_s_own_plugin_is_reserved(site: Site) -> None:
    """A distribution that claims it is broken, and the core loads all the same."""
    site.install("acme", NEVER, plugin="builtin")
    registry = site.collect()
    assert registry.attention("torch").provider.distribution == "paddock"
    assert "belongs to paddock" in registry.broken[0].reason
