"""Where kernels are launched, and how what a step would launch is compiled, all at once, without launching it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
import triton
from attrs import field, frozen
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import make_backend
from triton.experimental.gluon.nvidia import hopper as gluon
from triton.runtime import build, driver
from triton.runtime.cache import triton_key
from triton.tools.tensor_descriptor import TensorDescriptor

from paddock_triton.compiler_processes import CompilerProcesses

_MOST_THREADS = 16
_LEAST_PROCESSES = 4  # with fewer cores to run on, threads keep them as busy
# Seconds a thread keeps Python's lock that others wait for: a kernel on its way into the compiler takes it a thousand times. One
# beside a busy thread took 5.4 s with Python's own 5 ms, 1.4 with 1 ms, 0.7 with this, 0.5 alone.
_SWITCH_SECONDS = 1e-4


@frozen(eq=False)
class _Asked:
    """What has been asked for since launches became compilations: a layer asks for the same kernels as the one before it."""

    kinds: set[tuple[object, ...]] = field(factory=set)

    def compile(self, kernel: Any, grid: tuple[int, ...], args: tuple[object, ...], options: dict[str, Any]) -> None:
        """Have the kernel for such arguments compiled, unless it is one already asked for."""
        if knobs.runtime.interpret:
            return
        kind = (kernel, *map(_kind, args), *((name, _kind(value)) for name, value in options.items()))
        if kind not in self.kinds:
            self.kinds.add(kind)
            kernel.warmup(*args, grid=grid, **options)


@frozen(eq=False)
class _Loading:
    """The executor that Triton is given: a kernel compiled in a thread is brought to the device there too."""

    threads: ThreadPoolExecutor

    def submit(self, compiled: Callable[[], Any]) -> Future[Any]:
        """Start a compilation; its launcher is compiled, in C, and its code loaded after it."""
        return self.threads.submit(_loaded, compiled)


class _Ahead(triton.AsyncCompileMode):  # type: ignore[misc]
    """Triton's compiling in threads, each of which has a process compile what the cache does not hold."""

    def __init__(self, threads: ThreadPoolExecutor, processes: CompilerProcesses | None) -> None:
        super().__init__(_Loading(threads), ignore_errors=True)
        self._processes = processes

    def submit(self, key: str, compiled: Callable[[], Any], finished: Callable[[Any], None]) -> Any:
        """Start a compilation, unless it has been."""
        if self._processes is not None:
            compiled = partial(_compiled_beside, self._processes, key, compiled)
        return super().submit(key, compiled, finished)


_asked: ContextVar[_Asked | None] = ContextVar("paddock_triton_asked", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: Any) -> None:
    """Launch a kernel; inside `compile_ahead` have it compiled instead."""
    asked = _asked.get()
    if asked is None:
        kernel[grid](*args, **options)
    else:
        asked.compile(kernel, grid, args, options)


def launches_nothing() -> bool:
    """Return whether this is inside `compile_ahead`, where nobody reads what an op returns."""
    return _asked.get() is not None


def compile_ahead(device: torch.device) -> AbstractContextManager[None]:
    """Return a context inside which nothing is launched; on leaving it every kernel that would have been is ready on `device`.

    Kernels compile beside each other and the caller: each in a thread, which has a process compile what the cache does not hold,
    for two threads never run Python at once, and from a kernel to the compiler's own language is Python. Then the thread has the
    launcher compiled, in C, and loads both. What does not compile is left to its launch, which says why. With an empty cache the
    processes start here already, while the caller does something else; so does what Triton does once a process before any
    kernel, in a thread: 0.24 s, nearly all of it a hash of its own 415 MB. Triton's interpreter compiles nothing.
    """
    workers = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    threads = ThreadPoolExecutor(workers, "paddock-compile", initializer=_attach, initargs=(index,))
    apart = workers >= _LEAST_PROCESSES and sys.executable and not knobs.runtime.interpret
    processes = CompilerProcesses(workers) if apart else None
    if processes is not None and _cache_is_empty():
        processes.start()
    return _compiling(threads, processes, threads.submit(_start_triton))


@contextmanager
def _compiling(threads: ThreadPoolExecutor, processes: CompilerProcesses | None, started: Future[None]) -> Iterator[None]:
    wait([started])  # if it failed, so will the first launch, and say why
    token, interval = _asked.set(_Asked()), sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with _launchers_apart(), threads, _Ahead(threads, processes):
            yield
    finally:
        sys.setswitchinterval(interval)
        _asked.reset(token)
        if processes is not None:
            processes.close()


def _cache_is_empty() -> bool:
    folder = Path(knobs.cache.dir)
    return not folder.is_dir() or not any(folder.iterdir())


@contextmanager
def _launchers_apart() -> Iterator[None]:
    """Load one launcher at a time, and let Triton have it in a namespace of its own.

    Triton 3.6 makes launchers C modules that all bear one name, and where Python is asked for one again it writes its functions
    over those of the module that last bore the name: before Triton had read them, a kernel could get another's launcher.
    """
    load, lock = build._load_module_from_path, Lock()

    def loaded(name: str, path: str) -> Any:
        with lock:
            return SimpleNamespace(**vars(load(name, path)))

    build._load_module_from_path = loaded
    try:
        yield
    finally:
        build._load_module_from_path = load


def _attach(index: int | None) -> None:
    """Let a thread load code to the GPU of that index."""
    if index is not None:
        torch.cuda.set_device(index)


def _start_triton() -> None:
    """Start Triton's driver and have it remember what each kernel's key in the cache holds of Triton and the assembler."""
    if not knobs.runtime.interpret:
        make_backend(driver.active.get_current_target()).hash()
        triton_key()


def _compiled_beside(processes: CompilerProcesses, key: str, compiled: Callable[[], Any]) -> Any:
    """Return a kernel, which is read from the cache once a process has compiled it."""
    processes.compile(key, compiled)
    return compiled()


def _loaded(compiled: Callable[[], Any]) -> Any:
    kernel = compiled()
    kernel.run  # noqa: B018  the property builds the launcher and loads the code
    return kernel


def _kind(value: object) -> object:
    """Return what arguments of one kernel have in common, and no less: those of another kernel differ in it."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor | gluon.TensorDescriptor):
        return value.base.dtype, value.base.data_ptr() % 16, *value.block_shape
    return type(value), value
