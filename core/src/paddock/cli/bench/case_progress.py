"""How far a run of many cases has come, on standard error: a bar on a terminal, elsewhere a line a case."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click
from attrs import define

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class CaseProgress(Protocol):
    """What is told of each case."""

    def begin(self, name: str) -> None:
        """Take note of the case that is under way."""

    def end(self, name: str, seconds: float) -> None:
        """Take note of a case done, and of its seconds on the wall."""


@contextmanager
def case_progress(total: int, *, beside_lines: bool) -> Iterator[CaseProgress]:
    """Yield what to tell of each of `total` cases; `beside_lines` says that standard output has a line a case already."""
    if beside_lines and sys.stdout.isatty():
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines(total=total)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar=bar, task=bar.add_task("", total=total))


class _Silent:
    def begin(self, name: str) -> None:
        pass

    def end(self, name: str, seconds: float) -> None:
        pass


@define(kw_only=True)
class _Lines:
    total: int
    done: int = 0

    def begin(self, name: str) -> None:
        pass

    def end(self, name: str, seconds: float) -> None:
        self.done += 1
        click.echo(f"{self.done:>4}/{self.total} {seconds:8.2f} s  {name}", err=True)


@define(kw_only=True)
class _Bar:
    bar: Progress
    task: TaskID

    def begin(self, name: str) -> None:
        self.bar.update(self.task, description=name)

    def end(self, name: str, seconds: float) -> None:
        self.bar.console.print(f"{seconds:8.2f} s  {name}", markup=False, highlight=False)
        self.bar.advance(self.task)
