"""`paddock chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.conversation import Conversation
from paddock.cli.engine_options import engine_options, open_llm
from paddock.cli.sampling_options import make_sampling, sampling_options, split_sampling
from paddock.cli.session import Session
from paddock.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from paddock.llm import LLM
    from paddock.request import SamplingParams

COMMANDS = {"/reset": "forget the conversation", "/help": "show this", "/quit": "leave (so does Ctrl-D)"}


@click.command(name="chat")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation [what its template says].")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=1024, show_default=True, metavar="N", help="Most tokens of an answer."
)
@click.option("--temperature", type=float, metavar="T", help="0 takes the likeliest token [what the model recommends, else 0].")
@sampling_options
@engine_options
@click.pass_obj
def command(session: Session, /, model: str, system: str | None, max_tokens: int, **options: Any) -> None:
    """Talk with MODEL, a folder or a hub id with a chat template.

    Answers stream as they come. Ctrl-C ends an answer, not the program. /reset forgets the conversation, /help lists the
    commands, /quit leaves. Lines may also come through a pipe, one message a line; the exit code is then 1 when one failed.
    """
    sampling, engine = split_sampling(options)
    make_sampling(sampling)  # a wrong value is said before the model loads
    with open_llm(session, model, engine) as llm:
        params = _params(llm, {**sampling, "max_tokens": max_tokens})
        all_well = _talk(llm, Conversation(llm, system=system, room=max_tokens), params)
    if not all_well:
        click.get_current_context().exit(1)


def _params(llm: LLM, given: dict[str, Any]) -> SamplingParams:
    """Return the model's recommended sampling (greedy where it recommends none) with what was given."""
    from attrs import evolve

    from paddock.request import SamplingParams

    recommended = llm.get_default_sampling_params()
    if recommended == SamplingParams():
        recommended = evolve(recommended, temperature=0.0)
    known = {name: getattr(recommended, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    return make_sampling({**known, **given})


def _talk(llm: LLM, conversation: Conversation, params: SamplingParams) -> bool:
    """Answer line after line; return False when lines came through a pipe and one of them failed."""
    terminal, failed = sys.stdin.isatty(), False
    if terminal:
        click.echo("Type a message, /help for help.", err=True)
    while (line := _read_line(terminal)) is not None:
        word = line.strip()
        if word == "/quit":
            break
        if word.startswith("/"):
            _obey(word, conversation)
        elif word:
            failed |= not _answer(llm, conversation, line, params)
    return terminal or not failed


def _read_line(terminal: bool) -> str | None:
    """Return the next line, None at the end of the input; Ctrl-C at the prompt drops the line."""
    if not terminal:
        line = sys.stdin.buffer.readline()
        return line.decode("utf-8", "replace").rstrip("\r\n") if line else None
    while True:
        try:
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then edits the line and remembers those before)
            return input("> ")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D leaves.", err=True)


def _obey(word: str, conversation: Conversation) -> None:
    if word == "/reset":
        conversation.reset()
        click.echo("The conversation starts anew.", err=True)
    elif word == "/help":
        click.echo("\n".join(f"{name:8}{what}" for name, what in COMMANDS.items()))
    else:
        click.echo(f"unknown command {word}: {did_you_mean(word, COMMANDS)}", err=True)


def _answer(llm: LLM, conversation: Conversation, line: str, params: SamplingParams) -> bool:
    """Print the answer as it comes and remember it, as far as it came; return False when the message cannot be answered."""
    text = ""
    try:
        prompt, dropped = conversation.ask(line)
        if dropped:
            click.echo(f"(The conversation is full: the oldest {dropped} messages are forgotten.)", err=True)
        with closing(llm.stream(prompt, params)) as outputs:  # type: ignore[type-var]
            for output in outputs:
                click.echo(output.text[len(text) :], nl=False)
                text = output.text
        if output.outputs[0].error is not None:
            raise RequestError(output.outputs[0].error)
        if output.finish_reason == "length":
            click.echo(f"\n(The answer is cut at {len(output.token_ids)} tokens.)", nl=False, err=True)
    except KeyboardInterrupt:
        click.echo(" ...", nl=False)
    except RequestError as error:
        conversation.retract()
        click.echo(f"error: {error}", err=True)
        return False
    conversation.answered(text)
    click.echo()
    return True
