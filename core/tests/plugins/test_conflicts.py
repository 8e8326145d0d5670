"""Two plugins of one name."""

from __future__ import annotations

from typing import Any

import pytest
from core.tests.plugins.made import Bringing, Site, given, model, model_source

from paddock.errors import OptionError, PluginError
from paddock.plugins import AttentionSpec, CommandSpec, ObserverSpec, OpSpec, ParallelSpec, QuantizationSpec, hookimpl
from paddock.plugins.registry import Registry

LOOKUPS = {
    "quantization": lambda registry: registry.quantization("cow"),
    "attention backend": lambda registry: registry.attention("cow"),
    "parallel strategy": lambda registry: registry.parallel("cow"),
    "command": lambda registry: registry.command("cow"),
    "observer": lambda registry: registry.observer("cow"),
    "op": lambda registry: registry.ops_for("gelu"),
}


class Everything:
    """Brings one of each kind, all called cow."""

    op_rank = 5

    @hookimpl
    def paddock_quantizations(self) -> list[QuantizationSpec]:
        """Return one."""
        return [QuantizationSpec(name="cow", detect="a:b", method="a:b")]

    @hookimpl
    def paddock_attention_backends(self) -> list[AttentionSpec]:
        """Return one."""
        fields: dict[str, Any] = {
            "devices": ["cuda"],
            "dtypes": ["bfloat16"],
            "kv_cache_dtypes": ["bfloat16"],
            "page_sizes": [16],
        }
        return [AttentionSpec(name="cow", factory="a:b", **fields)]

    @hookimpl
    def paddock_parallel_strategies(self) -> list[ParallelSpec]:
        """Return one."""
        return [ParallelSpec(name="cow", axis="tp", cuts=["heads"], communicator="a:b", runner="a:b")]

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return one."""
        return [OpSpec(op="gelu", implementation="a:b", devices=["cuda"], rank=self.op_rank)]

    @hookimpl
    def paddock_commands(self) -> list[CommandSpec]:
        """Return one."""
        return [CommandSpec(name="cow", command="a:b", help="Moo.")]

    @hookimpl
    def paddock_observers(self) -> list[ObserverSpec]:
        """Return one."""
        return [ObserverSpec(name="cow", factory="a:b")]


class Rival(Everything):
    """Brings the same names."""


class Better(Everything):
    """Brings the same names, and a higher rank where there is one."""

    op_rank = 6


def two_owners(site: Site) -> None:
    """Install two distributions that own one architecture, and each one of its own."""
    site.install("acme", model_source("Cow", "Calf"), version="1.2")
    site.install("zoo", model_source("Cow", "Zebra"), version="3.4")


def test_two_owners_of_an_architecture_are_an_error_when_it_is_asked_for(site: Site) -> None:
    """The error names both with their versions, and the setting that decides."""
    two_owners(site)
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("Cow")
    assert "architecture 'Cow' has 2 owners: acme 1.2 (plugin 'acme') and zoo 3.4 (plugin 'zoo')" in raised.value.message
    assert 'prefer={"Cow": "acme"}' in raised.value.fix


def test_a_conflict_leaves_the_other_names_alone(site: Site) -> None:
    """Only the name with two owners is out of reach, even when strict."""
    two_owners(site)
    registry = site.collect(strict=True)
    assert registry.model_for("Calf").provider.plugin == "acme"
    assert registry.model_for("Zebra").provider.plugin == "zoo"
    assert [conflict.name for conflict in registry.conflicts] == ["Cow"]


@pytest.mark.parametrize("owner", ["acme", "zoo"])
def test_prefer_decides_who_owns_an_architecture(site: Site, owner: str) -> None:
    """The other keeps what is its own, and what it lost is on record."""
    two_owners(site)
    registry = site.collect(prefer={"Cow": owner})
    assert registry.model_for("Cow").provider.distribution == owner
    assert registry.model_for("Calf")
    assert registry.model_for("Zebra")
    assert not registry.conflicts
    assert [each.provider.distribution for each in registry.overridden] == [{"acme": "zoo", "zoo": "acme"}[owner]]


def test_three_owners_are_all_named() -> None:
    """And a preference settles all of them at once."""
    plugins = [Bringing(model("A")) for _ in range(3)]
    assert len(given(*plugins).conflicts[0].owners) == 3
    assert not given(*plugins, prefer={"A": "Bringing#3"}).conflicts


@pytest.mark.parametrize("noun", LOOKUPS)
def test_two_owners_of_any_kind_of_name_are_an_error(noun: str) -> None:
    """Every kind of name has one owner."""
    name = "gelu" if noun == "op" else "cow"
    with pytest.raises(PluginError, match=f"{noun} '{name}' has 2 owners"):
        LOOKUPS[noun](given(Everything(), Rival()))


@pytest.mark.parametrize("noun", LOOKUPS)
def test_prefer_decides_for_any_kind_of_name(noun: str) -> None:
    """The chosen one is returned."""
    name = "gelu" if noun == "op" else "cow"
    found = LOOKUPS[noun](given(Everything(), Rival(), prefer={"cow": "Rival", "gelu": "Rival"}))
    provided = found[0] if noun == "op" else found
    assert provided.provider.plugin == "Rival", name


def test_rank_decides_between_implementations_of_an_op() -> None:
    """Different ranks are no conflict: the higher comes first, the core's own last."""
    registry = given(Everything(), Better())
    assert [each.provider.plugin for each in registry.ops_for("gelu")] == ["Better", "Everything", "builtin"]


def test_preferring_an_op_s_owner_keeps_the_reference_as_a_fallback() -> None:
    """Only the rival of the same rank goes."""
    registry = given(Everything(), Rival(), prefer={"gelu": "Rival"})
    assert [each.provider.plugin for each in registry.ops_for("gelu")] == ["Rival", "builtin"]


def test_ops_for_different_devices_live_side_by_side() -> None:
    """Equal ranks that serve nothing in common are no conflict."""

    class OnCpu:
        @hookimpl
        def paddock_ops(self) -> list[OpSpec]:
            return [OpSpec(op="gelu", implementation="a:b", devices=["cpu"], rank=5)]

    assert len(given(Everything(), OnCpu()).ops_for("gelu")) == 3


def test_a_command_of_the_core_has_one_owner_too() -> None:
    """A plugin cannot take over `generate` unless the user says so."""

    class Takes:
        @hookimpl
        def paddock_commands(self) -> list[CommandSpec]:
            return [CommandSpec(name="generate", command="a:b", help="Mine.")]

    with pytest.raises(PluginError, match=r"paddock \S+ \(plugin 'builtin'\)"):
        given(Takes()).command("generate")
    assert given(Takes(), prefer={"generate": "Takes"}).command("generate").spec.help == "Mine."


def test_a_preference_for_the_only_owner_is_honoured() -> None:
    """The setting may stay when the rival is uninstalled."""
    assert given(Bringing(model("A")), prefer={"A": "Bringing"}).model_for("A")


BAD_PREFERENCES = {
    "a name nobody brings": ({"Cwo": "acme"}, r"'Cwo', which no plugin brings(.|\n)*did you mean 'Cow'"),
    "an owner who does not bring it": ({"Calf": "zoo"}, r"'Calf' to 'zoo', which does not bring it(.|\n)*it comes from acme"),
    "an owner who is not installed": ({"Cow": "barn"}, r"'Cow' to 'barn', which does not bring it"),
    "an owner who is broken": ({"Cow": "bad"}, r"'Cow' to 'bad'(.|\n)*bad 1.0 .* failed at import: ZeroDivisionError"),
}


@pytest.mark.parametrize("case", BAD_PREFERENCES)
def test_a_preference_that_matches_nothing_is_an_error(site: Site, case: str) -> None:
    """An explicit choice is never replaced or passed over."""
    prefer, words = BAD_PREFERENCES[case]
    two_owners(site)
    site.install("bad", "1 / 0")
    with pytest.raises(OptionError, match=words):
        site.collect(prefer=prefer)


def test_conflicts_do_not_depend_on_order() -> None:
    """Owners are named in order of their plugins."""
    one, other = Everything(), Rival()
    assert given(one, other).conflicts == given(other, one).conflicts


def test_strategies_of_an_axis_are_found_by_its_option() -> None:
    """Two names for one axis are two candidates, no conflict."""

    class Ring:
        @hookimpl
        def paddock_parallel_strategies(self) -> list[ParallelSpec]:
            return [ParallelSpec(name="ring", axis="tp", cuts=["heads"], communicator="a:b", runner="a:b")]

    registry: Registry = given(Everything(), Ring())
    assert [each.spec.name for each in registry.parallel_for("tp")] == ["cow", "ring"]
    with pytest.raises(PluginError, match="pip install paddock-parallel"):
        registry.parallel_for("pp")
