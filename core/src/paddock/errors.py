"""Every error Paddock raises on purpose: what was wrong, with which value, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PaddockError(Exception):
    """An error a user can act on: `message` names the value that is wrong, `fix` the way out."""

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        """Return the message, followed by the way out on a line of its own."""
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class OptionError(PaddockError):
    """An engine option, a command-line value or an environment variable is unknown or out of range."""


class PluginError(PaddockError):
    """A plugin is broken, unknown, of the wrong version, or in conflict with another."""


class ModelConfigError(PaddockError):
    """A model's config.json lacks a key, or holds a key or value Paddock does not support."""


class PlanError(PaddockError):
    """What was asked for cannot run: a constraint does not hold or memory does not suffice."""


class CheckpointError(PaddockError):
    """The files of a model are missing, malformed, or do not match its config."""


class QualityError(PaddockError):
    """A quantised model is further from its source than was allowed, or how far cannot be measured."""


class KernelError(PaddockError):
    """A kernel does not compile or launch for what it was given; nothing else was run in its place."""


class RequestError(PaddockError):
    """One request is invalid; the others are not touched."""


class QueueFullError(RequestError):
    """The bounded waiting queue is full; try again later."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the nearest of `known`, or the sorted list of them when none is near.

    Upper and lower case count as the same.
    """
    choices = sorted(set(known))
    folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    return f"known: {', '.join(choices)}" if choices else "none is known"
