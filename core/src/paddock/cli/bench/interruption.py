"""Ctrl-C and SIGTERM while something is measured: what was measured until then is still told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from attrs import define

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@define(kw_only=True)
class Interruption:
    """Whether the process was asked to end: also where the KeyboardInterrupt was lost in an error it led to."""

    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Yield what knows of an interruption: inside, both signals raise KeyboardInterrupt; a second one ends what follows."""
    interruption = Interruption()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interruption.asked = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread to set
        yield interruption
        return
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
