"""A broken plugin leaves nothing behind, is remembered, is quoted when it might be missed, and is fatal when strict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from core.tests.plugins.made import Bringing, Site, given, model, model_source

from paddock.errors import PluginError
from paddock.plugins import AttentionSpec, CommandSpec, Issue, ModelSpec, OpSpec, hookimpl

BROKEN_SOURCES = {
    "raises on import": ("import", "ZeroDivisionError: division by zero", "1 / 0"),
    "leaves on import": ("import", "SystemExit: 3", "raise SystemExit(3)"),
    "imports what is not there": ("import", "No module named 'no_such_module'", "import no_such_module"),
    "is not Python": ("import", "SyntaxError", "def ("),
    "is a class": ("collection", "is no plugin", "class Plugin: ..."),
}


@pytest.mark.parametrize("case", BROKEN_SOURCES)
def test_a_plugin_that_fails_on_import_is_isolated(site: Site, case: str) -> None:
    """Its stage and reason are remembered; its neighbour works."""
    stage, reason, source = BROKEN_SOURCES[case]
    metadata = site.install("bad", source, module="bad")
    if case == "is a class":
        (metadata / "entry_points.txt").write_text("[paddock.plugins.v1]\nbad = bad:Plugin\n")
    site.install("good", model_source("Good"))
    registry = site.collect()
    assert [provider.plugin for provider in registry.loaded] == ["builtin", "good"]
    (broken,) = registry.broken
    assert (broken.provider.distribution, broken.provider.version, broken.stage) == ("bad", "1.0", stage)
    assert reason in broken.reason


class RaisesHalfWay:
    """Gives one model, then fails."""

    @hookimpl
    def paddock_models(self) -> Iterator[ModelSpec]:
        """Yield one and raise."""
        yield model("Half")
        raise ValueError("no second one")


class RaisesAfterwards(Bringing):
    """Gives a model; another hook fails."""

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Raise."""
        raise KeyError("ops")


class Misspelt(Bringing):
    """Implements a hook that does not exist."""

    @hookimpl
    def paddock_modles(self) -> list[ModelSpec]:
        """Return nothing."""
        return []


class MisspeltBySpecname(Bringing):
    """Names a hook that does not exist."""

    @hookimpl(specname="paddock_op")
    def ops(self) -> list[OpSpec]:
        """Return nothing."""
        return []


class WrongArgument(Bringing):
    """Asks for an argument the hook does not have."""

    @hookimpl
    def paddock_commands(self, config: object) -> list[CommandSpec]:
        """Return nothing."""
        return []


class Unmarked(Bringing):
    """Names a function as a hook and forgets the marker."""

    def paddock_commands(self) -> list[CommandSpec]:
        """Return nothing."""
        return []


class Wraps(Bringing):
    """Wraps the others."""

    @hookimpl(wrapper=True)
    def paddock_commands(self) -> Any:
        """Pass the result on."""
        return (yield)


class WrapsOldStyle(Bringing):
    """Wraps the others the old way."""

    @hookimpl(hookwrapper=True)
    def paddock_commands(self) -> Any:
        """Pass the result on."""
        yield


class First(Bringing):
    """Wants to be called first."""

    @hookimpl(tryfirst=True)
    def paddock_commands(self) -> list[CommandSpec]:
        """Return nothing."""
        return []


class Last(Bringing):
    """Wants to be called last."""

    @hookimpl(trylast=True)
    def paddock_commands(self) -> list[CommandSpec]:
        """Return nothing."""
        return []


class BringsOps:
    """Brings op implementations."""

    def __init__(self, *ops: OpSpec) -> None:
        """Keep them."""
        self.ops = ops

    @hookimpl
    def paddock_ops(self) -> tuple[OpSpec, ...]:
        """Return them."""
        return self.ops


class Fails:
    """Fails when it makes its descriptor."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """Keep how."""
        self.make = make

    @hookimpl
    def paddock_attention_backends(self) -> list[Any]:
        """Return what cannot be made."""
        return [self.make()]


def backend(**changes: Any) -> AttentionSpec:
    """Return a backend with some fields changed."""
    fields: dict[str, Any] = {
        "name": "a",
        "factory": "a:b",
        "devices": ["cpu"],
        "dtypes": ["float32"],
        "kv_cache_dtypes": ["float32"],
    }
    return AttentionSpec(**(fields | {"page_sizes": [16]} | changes))


def op(name: str = "gelu", **changes: Any) -> OpSpec:
    """Return an implementation of an op."""
    return OpSpec(**({"op": name, "implementation": "a:b", "devices": ["cpu"]} | changes))


BROKEN_OBJECTS = {
    "fails half way": (RaisesHalfWay(), "ValueError: no second one"),
    "fails in another hook": (RaisesAfterwards(model("A")), "KeyError: 'ops'"),
    "misspells a hook": (Misspelt(model("A")), "a hook 'paddock_modles' that does not exist"),
    "names an unknown hook": (MisspeltBySpecname(model("A")), "a hook 'paddock_op' that does not exist"),
    "asks for an unknown argument": (WrongArgument(model("A")), "'config'"),
    "forgets the marker": (Unmarked(model("A")), "paddock_commands is not marked as a hook"),
    "wraps": (Wraps(model("A")), "wraps (wrapper=True)"),
    "wraps the old way": (WrapsOldStyle(model("A")), "wraps (hookwrapper=True)"),
    "wants to be first": (First(model("A")), "wants to run first"),
    "wants to be last": (Last(model("A")), "wants to run last"),
    "returns another descriptor": (Bringing(model("A"), op()), "returned OpSpec("),
    "returns a dict": (Bringing({"name": "A"}), "returned {'name': 'A'} among its results"),
    "brings one name twice": (Bringing(model("A"), model("B", "A")), "architecture 'A' twice"),
    "names one architecture twice": (Bringing(model("A", "A")), "names one architecture twice"),
    "has an op the core lacks": (BringsOps(op("silu_mull")), "an op 'silu_mull' that the core does not define"),
    "has two ops nothing decides between": (BringsOps(op(), op(devices=["cpu", "cuda"])), "op 'gelu' twice"),
    "writes no reference": (Fails(lambda: backend(factory="a.b")), "factory is 'a.b'"),
    "writes a string for names": (Fails(lambda: backend(devices="cuda")), "'cuda' stands where several names are meant"),
    "names no device": (Fails(lambda: backend(devices=[])), "devices is empty"),
    "writes a number for a name": (Fails(lambda: backend(dtypes=[16])), "16 stands where a name is meant"),
    "has no name": (Fails(lambda: backend(name="")), "name is ''"),
    "leaves out a field": (Fails(lambda: CommandSpec(name="a", command="a:b")), "'help'"),  # type: ignore[call-arg]
    "is a class": (Bringing, "is no plugin"),
    "is a string": ("llama", "'llama' is no plugin"),
}


@pytest.mark.parametrize("case", BROKEN_OBJECTS)
def test_a_plugin_that_fails_on_collection_leaves_nothing(case: str) -> None:
    """None of its contributions stay, and a healthy plugin beside it does."""
    plugin, reason = BROKEN_OBJECTS[case]
    registry = given(plugin, Bringing(model("Healthy")))
    assert [each.spec.architectures for each in registry.models] == [("Healthy",)]
    (broken,) = registry.broken
    assert reason in broken.reason
    assert broken.stage == "collection"
    assert broken.fix


@pytest.mark.parametrize("result", [None, 3, model("A"), "llama"])
def test_a_hook_returns_an_iterable_of_its_descriptor(result: object) -> None:
    """Nothing, a number, a bare descriptor and a string are none."""

    class Returns:
        @hookimpl
        def paddock_models(self) -> Any:
            return result

    (broken,) = given(Returns()).broken
    assert "paddock_models returned" in broken.reason
    assert "return a list" in broken.fix


def test_the_nearest_hook_is_suggested() -> None:
    """A misspelt hook's fix is one word long."""
    assert given(Misspelt()).broken[0].fix == "did you mean 'paddock_models'?"


def test_the_reason_says_where_in_the_plugin_it_failed(site: Site) -> None:
    """File and line are those of the plugin's own code."""
    site.install("bad", "\n\n1 / 0\n", module="bad_at_three")
    assert site.collect().broken[0].reason.endswith("bad_at_three.py, line 3)")


def test_an_optional_hook_of_another_core_is_passed_over() -> None:
    """A plugin may speak to newer cores too, if it says so."""

    class Ahead(Bringing):
        @hookimpl(optionalhook=True)
        def paddock_hook_of_tomorrow(self) -> None:
            raise AssertionError("called")

    assert given(Ahead(model("A"))).model_for("A")


def test_a_hook_may_be_implemented_under_another_name() -> None:
    """Pluggy's specname works."""

    class Named:
        @hookimpl(specname="paddock_models")
        def my_models(self) -> list[ModelSpec]:
            return [model("A")]

    assert given(Named()).model_for("A")


def test_a_generator_is_an_iterable_of_descriptors() -> None:
    """A hook may yield."""

    class Yields:
        @hookimpl
        def paddock_models(self) -> Iterator[ModelSpec]:
            yield model("A")
            yield model("B")

    assert len(given(Yields()).models) == 2


def test_a_missing_name_quotes_every_broken_plugin(site: Site) -> None:
    """The user sees why what was installed is not there, and the cause keeps the traceback."""
    site.install("bad", "1 / 0", version="4.2", plugin="cow")
    with pytest.raises(PluginError) as raised:
        site.collect().model_for("CowForCausalLM")
    assert "bad 4.2 (plugin 'cow') failed at import: ZeroDivisionError: division by zero" in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_broken_plugin_is_fatal_when_strict(site: Site) -> None:
    """Every broken plugin is named at once."""
    site.install("bad", "1 / 0")
    site.install("worse", "import no_such_module")
    with pytest.raises(PluginError, match=r"2 plugins are broken(.|\n)*division by zero(.|\n)*no_such_module"):
        site.collect(strict=True)


def test_a_failing_exception_message_is_survived() -> None:
    """Even an error that cannot be printed costs its plugin alone."""

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    class Raises:
        @hookimpl
        def paddock_models(self) -> list[ModelSpec]:
            raise UnprintableError

    assert "UnprintableError" in given(Raises()).broken[0].reason


def test_an_issue_has_one_of_three_levels() -> None:
    """A level nobody reads is refused where it is made."""
    with pytest.raises(PluginError, match="level is 'fatal'"):
        Issue(level="fatal", code="a", message="b")
