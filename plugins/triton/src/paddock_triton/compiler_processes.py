"""Processes that compile kernels for this one into Triton's cache: many at once, where Python's lock lets threads do one.

A process imports torch and Triton, takes kernels as Triton describes them to its own compiler, and never touches a GPU. It ends
with whoever started it: its connection closes then.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import io
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from attrs import define, field, frozen
from triton import knobs
from triton.runtime.cache import get_cache_manager, triton_key
from triton.runtime.jit import JITFunction

_BEGIN = "import sys; sys.path[:] = {path!r}; from paddock_triton.compiler_processes import serve; serve({file})"
_LONGEST_NAME = 150  # of a kernel, in the names of its files


class _Pickler(pickle.Pickler):
    """Pickles kernels by name: what one is, its module says. With its hash: Triton's depends on which functions have theirs."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how to find a kernel again; others as ever."""
        return (_named, (obj.__module__, obj.__name__, obj.cache_key)) if isinstance(obj, JITFunction) else NotImplemented


def _named(module: str, name: str, hashed: str) -> Any:
    kernel = getattr(importlib.import_module(module), name)
    kernel.hash = hashed
    return kernel


@frozen
class Job:
    """A kernel to compile, as Triton's `compile` takes it."""

    source: Any  # kernel, types, constants
    target: Any
    options: dict[str, Any]
    environment: dict[str, str]  # what of it makes another kernel

    @classmethod
    def of(cls, compiled: Callable[[], Any]) -> Job:
        """Return what a compilation that Triton asks for would compile; raise KeyError where it says so in another way."""
        given = inspect.getclosurevars(compiled).nonlocals
        return cls(given["src"], given["target"], given["options"].__dict__, given["env_vars"])

    def is_cached(self, key: str) -> bool:
        """Return whether Triton's cache holds the kernel of a key."""
        name = f"{self.source.name[:_LONGEST_NAME]}.json"
        found = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name)
        return found is not None and name in found

    def packed(self) -> bytes:
        """Return it as a process takes it; raises what pickling raises where something of it is of this process alone."""
        file = io.BytesIO()
        _Pickler(file).dump((knobs.cache.dir, self.source, self.target, self.options, self.environment))
        return file.getvalue()


@frozen
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection

    @classmethod
    def start(cls) -> _Worker:
        here, there = Pipe()
        code = _BEGIN.format(path=sys.path, file=there.fileno())
        with there:
            process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        return cls(process, here)

    def close(self) -> None:
        self.connection.close()
        self.process.kill()  # it waits for a kernel or, if we failed, compiles one that nobody waits for; files come whole
        self.process.wait()


@define(eq=False)
class CompilerProcesses:
    """Up to `count` processes: all are started at once, or each when a kernel is given and none is idle.

    Kernels may be given from as many threads. What a process cannot compile is left to whoever gave it.
    """

    count: int
    _workers: list[_Worker] = field(init=False, factory=list)
    _idle: SimpleQueue[_Worker] = field(init=False, factory=SimpleQueue)
    _starting: Lock = field(init=False, factory=Lock)
    _failed: bool = field(init=False, default=False)

    def start(self) -> None:
        """Start all; each takes seconds until it compiles, and this process none."""
        while (worker := self._started()) is not None:
            self._idle.put(worker)

    def compile(self, key: str, compiled: Callable[[], Any]) -> None:
        """Have the kernel of a key in Triton's cache; where it could not be brought there, say why and leave it."""
        try:
            job = Job.of(compiled)
            if self._failed or job.is_cached(key):
                return
            self._give(job.packed())
        except Exception as error:  # this Triton's inner ways, a kernel of a script, a process that died: threads compile too
            self._failed = True
            warnings.warn(f"kernels compile in threads, more slowly than in processes: {error!r}", RuntimeWarning, stacklevel=2)

    def _started(self) -> _Worker | None:
        """Return one more process, None where there are as many as there may be."""
        with self._starting:
            if len(self._workers) == self.count:
                return None
            self._workers.append(_Worker.start())
            return self._workers[-1]

    def _give(self, packed: bytes) -> None:
        try:
            worker = self._idle.get_nowait()
        except Empty:
            worker = self._started() or self._idle.get()
        try:
            worker.connection.send_bytes(packed)
            worker.connection.recv_bytes()  # what did not compile will say why where it is launched
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End them."""
        for worker in self._workers:
            worker.close()


def serve(file: int) -> None:
    """Compile what comes over a connection until it closes, and say when each is done, whatever came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts us with whoever started us, who ends us
    connection = Connection(file)
    os.dup2(2, 1)  # what the compiler prints is no part of the program's output
    gc.disable()
    importlib.import_module("torch")  # all kernels' modules do
    compiler = importlib.import_module("triton.compiler")
    triton_key()  # which Triton remembers
    while True:
        try:
            packed = connection.recv_bytes()
        except (EOFError, OSError):
            return
        with suppress(Exception):
            knobs.cache.dir, source, target, options, environment = pickle.loads(packed)
            compiler.compile(source, target=target, options=options, _env_vars=environment)
        connection.send_bytes(b"done")
