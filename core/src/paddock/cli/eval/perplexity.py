"""`paddock eval perplexity`: how well a model predicts a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from paddock.cli.bench.figures import commit_option, json_option
from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.eval.reports import facts, figures, give, text_option
from paddock.cli.session import Session
from paddock.progress import count_progress
from paddock.text.utf8 import read_utf8

_WINDOW = 2048


@click.command(short_help="How well a model predicts a text.")
@click.argument("model")
@text_option
@click.option(
    "--window", type=int, metavar="N", help=f"Tokens of a window [{_WINDOW}, or what max_model_len leaves if that is less]."
)
@click.option("--limit", type=int, metavar="N", help="Score the first N windows alone.")
@engine_options
@commit_option
@json_option
@click.pass_obj
def perplexity(
    session: Session,
    /,
    model: str,
    text: Path,
    window: int | None,
    limit: int | None,
    commit: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How well MODEL predicts a text: e to the mean negative log-likelihood of a token.

    The text is encoded once, with a bos token where the tokenizer puts one, and cut into windows that do not overlap; the first
    token of each window is not scored.
    """
    from paddock.evaluation import prediction as measuring
    from paddock.evaluation.texts import check_limit

    check_limit(limit)
    content = read_utf8(text)
    with open_llm(session, model, options) as llm, count_progress("windows") as advance:
        size = min(_WINDOW, llm.max_model_len - 1) if window is None else window
        began = time.perf_counter()
        found = measuring.perplexity(llm, content, window=size, limit=limit, progress=advance)
        seconds = time.perf_counter() - began
        report = {
            "eval": "perplexity",
            "model": model,
            "text": str(text),
            "window": size,
            **figures(found, measuring.DEFINITIONS, seconds),
            **facts(llm, commit),
        }
    give(
        report, measuring.DEFINITIONS, "plan", title=f"perplexity of {text} by {model}, windows of {size} tokens", as_json=as_json
    )
