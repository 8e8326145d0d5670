"""`paddock generate`: prompts in, continuations out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.sampling_options import make_sampling, sampling_options, split_sampling
from paddock.cli.session import Session
from paddock.text.utf8 import decode_utf8, read_bounded

if TYPE_CHECKING:
    from paddock.llm import LLM
    from paddock.request import RequestOutput, SamplingParams


@click.command(name="generate")
@click.argument("model")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompts-file", type=click.Path(path_type=Path), metavar="FILE", help="Further prompts, one a line, in UTF-8.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Most tokens of an answer."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token.")
@sampling_options
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line: prompt, text, token_ids, finish_reason.")
@click.pass_obj
def command(
    session: Session,
    /,
    model: str,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    max_tokens: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue each PROMPT with MODEL, a folder or a hub id.

    All prompts run at once; answers come in the order of the prompts. `-` stands for prompts on standard input, one a line.
    A prompt is continued as it is; `paddock chat` uses the model's chat template. The exit code is 1 when a prompt failed;
    the others are answered all the same.
    """
    texts = gather_prompts(prompts, prompts_file)
    if not texts:
        raise click.UsageError("no prompts: give some, --prompts-file FILE, or - for standard input")
    sampling, engine = split_sampling(options)
    params = make_sampling({**sampling, "max_tokens": max_tokens})
    with open_llm(session, model, engine) as llm:
        if len(texts) == 1 and not as_json:
            outputs = [_stream(llm, texts[0], params)]
        else:
            outputs = llm.generate(texts, params)
            for output in outputs:
                _print_json(output) if as_json else _print_text(output)
    if any(part.finish_reason == "error" for output in outputs for part in output.outputs):
        click.get_current_context().exit(1)


def gather_prompts(prompts: tuple[str, ...], prompts_file: Path | None) -> list[str]:
    """Return the prompts of the command line, with those of standard input in place of `-`, then those of the file."""
    texts: list[str] = []
    for prompt in prompts:
        texts += read_lines(sys.stdin.buffer.read(), "standard input") if prompt == "-" else [prompt]
    if prompts_file is not None:
        texts += read_lines(read_bounded(prompts_file), str(prompts_file))
    return texts


def read_lines(data: bytes, name: str) -> list[str]:
    """Return the lines of a UTF-8 text; raise OptionError naming line and byte where it is no UTF-8."""
    lines = decode_utf8(data, name).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> RequestOutput:
    """Print an answer as it comes and return its last output."""
    shown = 0
    for output in llm.stream([prompt], params):
        click.echo(output.text[shown:], nl=False)
        shown = len(output.text)
    if shown or output.finish_reason != "error":
        click.echo()
    _say_error(output)
    return output


def _print_text(output: RequestOutput) -> None:
    click.secho(f"> {output.prompt}", bold=True)
    click.echo(f"{output.text}\n")
    _say_error(output)


def _say_error(output: RequestOutput) -> None:
    for part in output.outputs:
        if part.error is not None:
            click.echo(f"error: {output.prompt!r:.60}: {part.error}", err=True)


def _print_json(output: RequestOutput) -> None:
    part = output.outputs[0]
    line = {"prompt": output.prompt, "text": part.text, "token_ids": part.token_ids, "finish_reason": part.finish_reason}
    click.echo(json.dumps(line if part.error is None else {**line, "error": part.error}, ensure_ascii=False))
