"""The options of every command that samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paddock.errors import OptionError, RequestError

if TYPE_CHECKING:
    from paddock.request import SamplingParams

Command = TypeVar("Command", bound=Callable[..., object])

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
_OPTIONS = (
    click.option("--top-p", type=float, metavar="P", help="Sample among the likeliest tokens that make up this probability."),
    click.option("--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens."),
    click.option("--min-p", type=float, metavar="P", help="Drop tokens less likely than this share of the likeliest."),
    click.option("--repetition-penalty", type=float, metavar="R", help="Above 1: make tokens already there less likely."),
    click.option("--seed", type=click.IntRange(0), metavar="S", help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer at this text; may be given several times."),
)


def sampling_options(command: Command) -> Command:
    """Add the sampling options, but for temperature and length, whose defaults a command states itself."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def split_sampling(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a command's sampling options that were given, and all its other options."""
    sampling = {name: options[name] for name in SAMPLING if options.get(name) not in (None, ())}
    return sampling, {name: value for name, value in options.items() if name not in SAMPLING}


def make_sampling(values: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling of those values; one out of range is wrong usage, an OptionError."""
    from paddock.request import SamplingParams

    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise OptionError(error.message, fix=error.fix) from error
