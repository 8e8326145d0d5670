"""A descriptor refuses a value that planning could never use, where it is written and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paddock.errors import PluginError
from paddock.plugins import AttentionSpec, CommandSpec, Issue, ModelSpec, OpSpec, ParallelSpec, QuantizationSpec, RecipeSpec


def attention(**changes: Any) -> AttentionSpec:
    """Return a backend with some fields changed."""
    fields: dict[str, Any] = {"devices": ["cuda"], "dtypes": ["float16"], "kv_cache_dtypes": ["fp8"], "page_sizes": [16]}
    return AttentionSpec(name="a", factory="a:b", **(fields | changes))


def parallel(**changes: Any) -> ParallelSpec:
    """Return a strategy with some fields changed."""
    return ParallelSpec(**({"name": "a", "axis": "tp", "cuts": ["heads"], "communicator": "a:b", "runner": "a:b"} | changes))


def op(**changes: Any) -> OpSpec:
    """Return an implementation with some fields changed."""
    return OpSpec(**({"op": "gelu", "implementation": "a:b", "devices": ["cpu"]} | changes))


REFUSED: dict[str, tuple[Callable[[], object], str, str]] = {
    "device": (lambda: op(devices=["gpu"]), "devices holds 'gpu'", "cpu"),
    "device auto": (lambda: op(devices=["auto"]), "devices holds 'auto'", "cpu, cuda"),
    "dtype": (lambda: op(dtypes=["bf16"]), "dtypes holds 'bf16'", "bfloat16"),
    "kv dtype": (lambda: attention(kv_cache_dtypes=["fp7"]), "kv_cache_dtypes holds 'fp7'", "did you mean 'fp8'?"),
    "no dtype": (lambda: attention(dtypes=[]), "dtypes is empty", "at least one"),
    "page size": (lambda: attention(page_sizes=["16"]), "page_sizes holds '16'", "above 0"),
    "no page": (lambda: attention(page_sizes=[0]), "page_sizes holds 0", "above 0"),
    "head": (lambda: attention(head_dims=[64.0]), "head_dims holds 64.0", "above 0"),
    "rank": (lambda: attention(rank="high"), "rank is 'high'", "whole number"),
    "rank true": (lambda: op(rank=True), "rank is True", "whole number"),
    "capability": (lambda: op(min_compute_capability=9.0), "min_compute_capability is 9.0", "(9, 0)"),
    "requires": (lambda: op(requires="triton"), "'triton' stands where several names are meant", "('triton',)"),
    "requires a part": (lambda: attention(requires=["a.b"]), "requires holds 'a.b'", "as they are imported"),
    "axis": (lambda: parallel(axis=""), "axis is ''", "name"),
    "nesting": (lambda: parallel(nesting="outer"), "nesting is 'outer'", "whole number"),
    "size": (lambda: parallel(max_size=0), "max_size holds 0", "above 0"),
    "quantisation": (lambda: QuantizationSpec(name="q", detect="a:b", method="a:b", devices=["gpu"]), "holds 'gpu'", "cpu"),
    "recipe": (lambda: RecipeSpec(name="r", create="a:b", kv_cache_dtypes=["int8"]), "kv_cache_dtypes holds 'int8'", "fp8"),
    "recipe made by": (lambda: RecipeSpec(name="r", create="a.b"), "create is 'a.b'", "package.module:attribute"),
    "help": (lambda: CommandSpec(name="a", command="a:b", help=None), "help is None", "text"),  # type: ignore[arg-type]
    "code": (lambda: Issue(level="info", code="", message="m"), "code is ''", "name"),
    "summary": (
        lambda: ModelSpec(
            name="m",
            architectures=["M"],
            parse_config="a:b",
            weights="a:b",
            attention="a:b",
            build="a:b",
            summary=7,  # type: ignore[arg-type]
        ),
        "summary is 7",
        "text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_nothing_could_use_is_refused_with_the_way_out(case: str) -> None:
    """The field, its value and what to write instead are said."""
    make, says, fix = REFUSED[case]
    with pytest.raises(PluginError) as raised:
        make()
    assert says in raised.value.message
    assert fix in raised.value.fix


def test_descriptors_are_frozen_and_equal_by_value() -> None:
    """They are data: nothing changes them, and order of devices or dtypes means nothing."""
    with pytest.raises(AttributeError):
        op().rank = 3  # type: ignore[misc]
    assert op(devices=["cpu", "cuda"]) == op(devices=["cuda", "cpu"])
    assert {op(), op()} == {op()}
