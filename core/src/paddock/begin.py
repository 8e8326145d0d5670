"""The import of all that runs a model, which takes seconds, and what need not wait for it.

For those who know what they want before torch is loaded: `LLM`, with it every command, and `paddock bench startup`. To import
`paddock` starts nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paddock.text.frontend import TextEngine

_DRIVER = "libcuda.so.1"


def import_assemble(device: str) -> Callable[..., TextEngine]:
    """Return `paddock.assemble.assemble` for an engine on `device` (`auto`, `cpu` or `cuda`).

    Where torch is not loaded yet and that may be a GPU, a thread meanwhile has the driver make the first GPU's primary context,
    the one that torch uses. From then on, as after torch's own first use of a GPU, the process must not fork to use it in the
    child; starting other programs is safe.
    """
    if "torch" in sys.modules:
        from paddock.assemble import assemble

        return assemble
    if device != "cpu" and _torch_knows_gpus():
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, but before the driver reads it
        Thread(target=_make_context, name="paddock-gpu", daemon=True).start()
    with _modules_kept():
        from paddock.assemble import assemble
    return assemble


def _torch_knows_gpus() -> bool:
    """Return whether torch, which is not imported for it, was built for CUDA."""
    spec = find_spec("torch")
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _make_context() -> None:
    """Make the first GPU's primary context; where that fails torch will meet the same failure, and report it."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)


@contextmanager
def _modules_kept() -> Iterator[None]:
    """Keep the garbage collector from what is imported: modules stay, and each look through all of them takes it 0.08 s.

    Of 1.22 s of a CPU's time that a small model's start took, 0.14 were the collector's.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()
