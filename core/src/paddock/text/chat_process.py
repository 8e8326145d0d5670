"""The near end of the chat rendering process: starts it, asks it, and ends it when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from paddock.errors import RequestError
from paddock.text.frames import LENGTH_BYTES, frame, length

START_SECONDS = 60.0  # a cold start on a busy machine; usually a tenth of a second
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")


class ChatProcess:
    """A rendering process that lives until `close`, is replaced when it dies, and answers one question at a time."""

    def __init__(self, *, memory_bytes: int, output_chars: int, seconds: float) -> None:
        self._arguments = (str(memory_bytes), str(output_chars), str(seconds))
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, ChatProcess] | None = None

    def ask(self, body: bytes) -> dict[str, str]:
        """Return the answer to one question (JSON in UTF-8); one that takes too long is `{"error": ..., "kind": "time"}`."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(frame(body))
                process.stdin.flush()
                reply: dict[str, str] = self._read(process, time.monotonic() + self._seconds)
            except TimeoutError:
                self._stop()
                return {"error": f"it takes longer than {self._seconds:g} s", "kind": "time"}
            except (EOFError, BrokenPipeError):
                self._stop()
                return {"error": "it ended the process that renders it", "kind": "memory"}
            except BaseException:  # an interrupt between question and answer: the pipe no longer lines up
                self._stop()
                raise
            if reply.get("kind") == "memory":
                self._stop()
            return reply

    def close(self) -> None:
        """End the process, if one runs."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        process = _start(self._arguments)
        self._process, self._end = process, weakref.finalize(self, _kill, process)
        try:
            self._read(process, time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            self._stop()
            raise RequestError(
                "the process that renders chat templates does not start", fix=f"run `{sys.executable} -c 'import jinja2'`"
            ) from None
        return process

    def _read(self, process: subprocess.Popen[bytes], deadline: float) -> Any:
        assert process.stdout is not None
        head = _read_exactly(process.stdout.fileno(), LENGTH_BYTES, deadline)
        return json.loads(_read_exactly(process.stdout.fileno(), length(head), deadline))

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _start(arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Start the worker: a bare interpreter with our import path, few variables, and no share in the terminal's Ctrl-C."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "paddock.text.chat_worker", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        process_group=0,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # bytes never taken
                pipe.close()
    process.wait()


def _read_exactly(descriptor: int, count: int, deadline: float) -> bytes:
    """Return `count` bytes; raise TimeoutError at the deadline, EOFError when the other end is gone."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    chunks = []
    while count:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        chunk = os.read(descriptor, min(count, 1 << 20))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)
