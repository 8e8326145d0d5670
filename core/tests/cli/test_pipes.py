"""The command line at the end of a pipe and under signals, in processes of its own."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

import pytest

from paddock.cli.errors import guarded

WAITS = """
import signal, sys, threading, click
from paddock.cli import main as shell
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever who runs the tests does with it
def wait():
    print("ready", flush=True)
    threading.Event().wait()
shell._loaded = lambda provided: click.Command("wait", callback=wait)
sys.exit(shell.main(["chat"]))
"""


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`paddock list ops | head -0` ends quietly."""
    process = subprocess.Popen(
        [sys.executable, "-m", "paddock", "list", "ops"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert error == ""


def test_output_that_cannot_be_flushed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command printed without flushing is lost in the open, with exit code 1."""

    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert guarded(lambda: 0, debug=False) == 1


def test_an_interrupted_process_exits_with_130() -> None:
    """A real SIGINT ends a waiting command without a traceback."""
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == ""
