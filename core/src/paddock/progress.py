"""How far long work has come, shown on standard error when that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paddock.request import RequestOutput


@contextmanager
def byte_progress(label: str, *, shown: bool | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with bytes done and bytes in all; `shown` None means when standard error is a terminal."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=shown is None) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def request_progress(total: int, *, shown: bool | None = None) -> Iterator[Callable[[RequestOutput], None]]:
    """Yield what to call with each finished output; `shown` None means when standard error is a terminal."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=shown is None) as bar:
        task = bar.add_task("", total=total, speed="")
        began, tokens = time.monotonic(), 0

        def advance(output: RequestOutput) -> None:
            nonlocal tokens
            tokens += sum(len(part.token_ids) for part in output.outputs)
            speed = tokens / max(time.monotonic() - began, 1e-9)
            bar.update(task, advance=1, speed=f"{speed:,.0f} tokens/s")

        yield advance


@contextmanager
def count_progress(label: str, *, shown: bool | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with how many are done and how many there are; `shown` None means when standard error is a terminal."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=shown is None) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
