"""`paddock compare`: two models, or two plans of one, over the same tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from paddock.cli.bench.figures import commit_option, json_option
from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.eval.reports import facts, figures, give, text_option
from paddock.cli.session import Session
from paddock.config import EngineConfig
from paddock.errors import OptionError
from paddock.progress import count_progress
from paddock.text.utf8 import read_utf8

_WINDOW = 512
# What is in no engine option of one side, and where it is said.
_ELSEWHERE = {
    "model": "name the model in place of A or B",
    "strict": "write --strict, which is for both",
    "prefer": "write --prefer NAME=OWNER before the command, which is for both",
}
_HALF = 0.46  # of a GPU's memory, for A: half of what one engine takes by default, so that B finds room beside it


def _overrides(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    option, given = parameter.opts[0], dict[str, Any]()
    for text in texts:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not (name and equals and value):
            raise OptionError(f"{option} is {text!r}", fix=f"write {option} NAME=VALUE, NAME being an engine option")
        if name in _ELSEWHERE:
            raise OptionError(f"{option} is {text!r}", fix=_ELSEWHERE[name])
        if name in given:
            raise OptionError(f"{option} gives {name!r} twice", fix="choose one")
        given[name] = _parsed(value)
    return given


def _parsed(text: str) -> Any:
    """Return a number, true or false as what it says, anything else as text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


@click.command(name="compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@text_option
@click.option(
    "--window", type=int, metavar="N", help=f"Tokens of a window [{_WINDOW}, or what max_model_len leaves if that is less]."
)
@click.option("--limit", type=int, metavar="N", help="Compare over the first N windows alone.")
@click.option(
    "--a",
    "only_a",
    multiple=True,
    callback=_overrides,
    metavar="NAME=VALUE",
    help="An engine option for A alone; may be repeated.",
)
@click.option(
    "--b", "only_b", multiple=True, callback=_overrides, metavar="NAME=VALUE", help="Likewise for B: --b kv_cache_dtype=fp8."
)
@engine_options
@commit_option
@json_option
@click.pass_obj
def command(
    session: Session,
    /,
    a: str,
    b: str,
    text: Path,
    window: int | None,
    limit: int | None,
    only_a: dict[str, Any],
    only_b: dict[str, Any],
    commit: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How far B's distributions over the next token are from A's, the reference, over the same text.

    A and B are folders or hub ids with one vocabulary: a model and a quantised copy, or one model twice with --a and --b telling
    the plans apart. Both are loaded at once. On a GPU A takes half of the memory unless told otherwise.
    """
    from paddock.evaluation import comparison as measuring
    from paddock.evaluation.texts import check_limit

    check_limit(limit)
    content = read_utf8(text)
    for_a, for_b = {**_halved(options), **only_a}, {**options, **only_b}
    for model, given in ((a, for_a), (b, for_b)):
        EngineConfig.from_options(
            model, **{name: value for name, value in given.items() if value is not None}
        )  # before any loads
    with (
        open_llm(session, a, for_a) as llm_a,
        open_llm(session, b, for_b) as llm_b,
        count_progress("windows") as advance,
    ):
        size = min(_WINDOW, llm_a.max_model_len - 1, llm_b.max_model_len - 1) if window is None else window
        began = time.perf_counter()
        found = measuring.compare(llm_a, llm_b, content, window=size, limit=limit, progress=advance)
        seconds = time.perf_counter() - began
        report = {
            "eval": "compare",
            "a": a,
            "b": b,
            "text": str(text),
            "window": size,
            **figures(found, measuring.DEFINITIONS, seconds),
            **_both_facts(facts(llm_a, commit), facts(llm_b, commit)),
        }
    give(
        report,
        measuring.DEFINITIONS,
        "plan_a",
        "plan_b",
        title=f"B, {b}, beside A, {a}: {text}, windows of {size} tokens",
        as_json=as_json,
    )


def _halved(options: Mapping[str, Any]) -> dict[str, Any]:
    utilization = options["gpu_memory_utilization"]
    return {**options, "gpu_memory_utilization": _HALF if utilization is None else utilization}


def _both_facts(of_a: dict[str, Any], of_b: dict[str, Any]) -> dict[str, Any]:
    """Return what the figures depend on, with both plans and the versions of both plans' plugins."""
    return {
        **of_b,
        "plan_a": of_a["plan"],
        "plan_b": of_b["plan"],
        "versions": {**of_a["versions"], **of_b["versions"]},
    }
