"""Plugins passed as objects."""

from __future__ import annotations

import importlib
import types

import pytest
from core.tests.plugins.made import Bringing, Site, given, model, model_source

from paddock.config import Environment
from paddock.errors import OptionError, PluginError
from paddock.plugins import ModelSpec, hookimpl
from paddock.plugins.host import PluginHost


def test_an_instance_is_a_plugin_given_in_code() -> None:
    """Its provider says so."""
    provider = given(Bringing(model("A"))).model_for("A").provider
    assert str(provider) == "given in code (plugin 'Bringing')"


def test_a_module_is_a_plugin() -> None:
    """Its functions are its hooks, its name its own."""

    @hookimpl
    def paddock_models() -> list[ModelSpec]:
        return [model("A")]

    module = types.ModuleType("made_module")
    module.paddock_models = paddock_models  # type: ignore[attr-defined]
    assert given(module).model_for("A").provider.plugin == "made_module"


def test_one_object_given_twice_counts_once() -> None:
    """It is not in conflict with itself."""
    plugin = Bringing(model("A"))
    assert len(given(plugin, plugin).models) == 1


def test_two_instances_of_one_class_have_names_of_their_own() -> None:
    """So a preference can tell them apart."""
    registry = given(Bringing(model("A")), Bringing(model("A")), prefer={"A": "Bringing#2"})
    assert registry.model_for("A").provider.plugin == "Bringing#2"


def test_an_installed_module_given_as_well_counts_once(site: Site) -> None:
    """It stays what it is: installed."""
    site.install("acme", model_source("A"), module="acme_given_too")
    module = importlib.import_module("acme_given_too")
    registry = PluginHost(plugins=[module], path=tuple(site.path), environment=Environment()).collect()
    assert registry.model_for("A").provider.distribution == "acme"


def test_without_autoload_nothing_installed_is_looked_for(site: Site) -> None:
    """Neither plugins nor names in the filter matter."""
    site.install("acme", "raise RuntimeError")
    environment = Environment(plugins=("no-such-plugin",))
    registry = PluginHost(autoload=False, path=tuple(site.path), environment=environment).collect()
    assert [provider.plugin for provider in registry.loaded] == ["builtin"]


def test_given_plugins_pass_the_filter(site: Site) -> None:
    """What is passed explicitly is wanted."""
    host = PluginHost(plugins=[Bringing(model("A"))], path=tuple(site.path), environment=Environment(plugins=()))
    assert host.collect().model_for("A")


def test_the_order_given_does_not_matter() -> None:
    """The same objects in any order make the same registry."""

    class Other(Bringing):
        pass

    one, other = Bringing(model("A")), Other(model("B"))
    assert given(one, other).models == given(other, one).models


def test_hosts_share_nothing() -> None:
    """A host is an instance: what one collects the next does not see."""
    given(Bringing(model("A")))
    with pytest.raises(PluginError):
        given().model_for("A")


def test_the_environment_is_read_when_the_host_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown PADDOCK_ variable is an error there, with the nearest name."""
    monkeypatch.setenv("PADDOCK_PLUGGINS", "llama")
    with pytest.raises(OptionError, match=r"PADDOCK_PLUGGINS(.|\n)*did you mean 'PADDOCK_PLUGINS'"):
        PluginHost()


def test_strict_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """PADDOCK_STRICT=1 makes a broken plugin an error."""
    monkeypatch.setenv("PADDOCK_STRICT", "1")
    with pytest.raises(PluginError, match="strict mode"):
        PluginHost(plugins=["not a plugin"], autoload=False).collect()
