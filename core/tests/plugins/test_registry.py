"""Lookups say the way out, and plan checks are guarded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from core.tests.plugins.made import Bringing, Site, given, model, model_source

from paddock.errors import PluginError
from paddock.plugins import Issue, hookimpl
from paddock.plugins.registry import Registry

HINTS: dict[str, tuple[Callable[[Registry], object], str]] = {
    "LlamaForCausalLM": (lambda registry: registry.model_for("LlamaForCausalLM"), "paddock-llama"),
    "FalconForCausalLM": (lambda registry: registry.model_for("FalconForCausalLM"), "paddock-falcon"),
    "RWForCausalLM": (lambda registry: registry.model_for("RWForCausalLM"), "paddock-falcon"),
    "fbgemm_fp8": (lambda registry: registry.quantization("fbgemm_fp8"), "paddock-quant-fp8"),
    "fp8": (lambda registry: registry.quantization("fp8"), "paddock-quant-fp8"),
    "awq": (lambda registry: registry.quantization("awq"), "paddock-quant-awq"),
    "triton": (lambda registry: registry.attention("triton"), "paddock-triton"),
    "tp": (lambda registry: registry.parallel("tp"), "paddock-parallel"),
    "pp": (lambda registry: registry.parallel("pp"), "paddock-parallel"),
    "serve": (lambda registry: registry.command("serve"), "paddock-serve"),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_name_of_a_first_party_plugin_says_what_to_install(site: Site, name: str) -> None:
    """The distribution is named though it is not installed."""
    lookup, distribution = HINTS[name]
    with pytest.raises(PluginError) as raised:
        lookup(site.collect())
    assert repr(name) in raised.value.message
    assert raised.value.fix == f"pip install {distribution}"


def test_an_unknown_architecture_names_what_is_installed_and_the_nearest(site: Site) -> None:
    """Both the plugins and the near miss are said."""
    site.install("acme", model_source("CowForCausalLM"))
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("CowForCasualLM")
    assert "acme 1.0 (plugin 'acme')" in raised.value.message
    assert raised.value.fix == "did you mean 'CowForCausalLM'?"


def test_a_near_miss_of_a_plugin_not_installed_says_how_to_get_it(site: Site) -> None:
    """The nearest name may be one that is not there yet."""
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("FalconForCasualLM")
    assert raised.value.fix == "did you mean 'FalconForCausalLM'? Then: pip install paddock-falcon"


def test_a_name_like_no_other_lists_what_there_is(site: Site) -> None:
    """Where nothing is near, all known names are given."""
    with pytest.raises(PluginError, match=r"FalconForCausalLM.*or install a plugin that brings it"):
        site.collect().model_for("Xyz")


def test_an_ending_all_architectures_share_makes_none_alike(site: Site) -> None:
    """`MixtralForCausalLM` is no misspelt `FalconForCausalLM`, however many letters they share."""
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("MixtralForCausalLM")
    assert "did you mean" not in raised.value.fix
    assert "known: FalconForCausalLM" in raised.value.fix


def test_a_plugin_kept_out_by_the_filter_is_the_way_out(site: Site) -> None:
    """No use in installing what is installed."""
    site.install("paddock-llama", model_source("LlamaForCausalLM"), plugin="llama")
    with pytest.raises(PluginError) as raised:
        site.collect(only=()).model_for("LlamaForCausalLM")
    assert "kept out by PADDOCK_PLUGINS: paddock-llama" in raised.value.message
    assert raised.value.fix == "add llama to PADDOCK_PLUGINS"


def test_a_broken_first_party_plugin_is_to_be_repaired_not_installed(site: Site) -> None:
    """The reason is quoted and the fix is that of the failure."""
    site.install("paddock-llama", "1 / 0", plugin="llama")
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("LlamaForCausalLM")
    assert "ZeroDivisionError" in raised.value.message
    assert raised.value.fix == "repair, upgrade or uninstall paddock-llama"


def test_an_old_first_party_plugin_is_to_be_upgraded(site: Site) -> None:
    """It is installed and works, but lacks the name."""
    site.install("paddock-falcon", model_source("FalconForCausalLM"), plugin="falcon")
    with pytest.raises(PluginError, match="pip install --upgrade paddock-falcon"):
        site.collect().model_for("RWForCausalLM")


def test_without_autoload_the_way_out_says_so() -> None:
    """Installing alone would change nothing."""
    with pytest.raises(PluginError, match=r"pass it in plugins=\[...\] or leave autoload on"):
        given().model_for("LlamaForCausalLM")


class Checks:
    """A plugin that checks plans."""

    def __init__(self, result: Any) -> None:
        """Keep what to answer: a value, or an exception to raise."""
        self.result = result

    @hookimpl
    def paddock_check_plan(self, plan: Any) -> Any:
        """Answer."""
        if isinstance(self.result, Exception):
            raise self.result
        return [Issue(level="info", code="seen", message=str(plan))] if self.result is None else self.result


def test_every_plugin_checks_the_plan() -> None:
    """The plan reaches each check, and their issues come back in order of plugin."""
    issues = given(Checks(None), Checks([Issue(level="error", code="no", message="never")])).check_plan("the plan")
    assert [(issue.level, issue.message) for issue in issues] == [("info", "the plan"), ("error", "never")]


def test_a_check_need_not_take_the_plan() -> None:
    """Arguments are opted into."""

    class Indifferent:
        @hookimpl
        def paddock_check_plan(self) -> list[Issue]:
            return [Issue(level="info", code="hi", message="hi")]

    assert len(given(Indifferent()).check_plan(object())) == 1


@pytest.mark.parametrize("result", [ValueError("oops"), 3, ["not an issue"]])
def test_a_check_that_fails_is_a_warning_naming_its_plugin(result: Any) -> None:
    """A plan is not stopped by the code that looks at it."""
    (issue,) = given(Checks(result)).check_plan(object())
    assert (issue.level, issue.code) == ("warning", "plan_check_failed")
    assert "plugin 'Checks'" in issue.message


def test_a_registry_cannot_be_changed() -> None:
    """What is installed is a value."""
    registry = given(Bringing(model("A")))
    with pytest.raises(AttributeError):
        registry.models = ()  # type: ignore[misc]
