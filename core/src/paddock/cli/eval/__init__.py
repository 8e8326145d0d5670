"""`paddock eval`: how good a model's answers are, and the sets to find out with."""

from __future__ import annotations

import click

from paddock.cli.eval import choices, fetch, perplexity

__all__ = ["command"]


@click.group(name="eval")
def command() -> None:
    """Measure how well MODEL predicts a text and answers multiple-choice questions; every figure is defined.

    Every prompt goes through the engine as a user's would, with the options of the other commands: a figure is that of the plan
    it names. `paddock compare` holds two models, or two plans of one, beside each other, token by token.
    """


for each in (perplexity.perplexity, choices.choices, fetch.fetch):
    command.add_command(each)
