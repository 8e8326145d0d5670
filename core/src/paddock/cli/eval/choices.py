"""`paddock eval choices`: how many multiple-choice questions a model gets right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from paddock.cli.bench.figures import commit_option, json_option
from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.eval.reports import facts, figures, give
from paddock.cli.session import Session
from paddock.progress import count_progress

_TASKS = "mmlu, hellaswag, arc_easy, arc_challenge, piqa, winogrande or boolq"


@click.command(short_help="How many multiple-choice questions a model gets right.")
@click.argument("model")
@click.option("--task", required=True, metavar="NAME", help=f"One of {_TASKS}.")
@click.option("--limit", type=int, metavar="N", help="Ask the first N documents alone.")
@click.option("--shots", type=int, default=0, show_default=True, metavar="K", help="Answered questions before each.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where NAME.jsonl lies [where `paddock eval fetch` puts it].",
)
@engine_options
@commit_option
@json_option
@click.pass_obj
def choices(
    session: Session,
    /,
    model: str,
    task: str,
    limit: int | None,
    shots: int,
    data: Path | None,
    commit: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How many questions of a task MODEL gets right: the continuation with the highest log-likelihood is its choice.

    Prompts and scoring are those of lm-evaluation-harness. Documents are fetched once, with `paddock eval fetch NAME`; a file
    of your own in the same form serves as well.
    """
    from paddock.evaluation import multiple_choice as measuring
    from paddock.evaluation.documents import read_documents
    from paddock.evaluation.texts import check_limit

    check_limit(limit)
    known = read_documents(task, data)
    prompts = measuring.prompts_of(task, known.documents, shots=shots, examples=known.examples, limit=limit)
    with open_llm(session, model, options) as llm, count_progress("continuations") as advance:
        began = time.perf_counter()
        found = measuring.score(llm, prompts, progress=advance)
        seconds = time.perf_counter() - began
        report = {
            "eval": "choices",
            "model": model,
            "task": task,
            **figures(found, measuring.DEFINITIONS, seconds),
            **facts(llm, commit),
        }
    give(report, measuring.DEFINITIONS, "plan", title=f"{task} by {model}", as_json=as_json)
