"""Run modules, each in a process of its own that need not import torch, Triton and the kernels again: a child of this one.

Each line read is a JSON object: the module, its words, what it has in its environment beside this one's, and the files for what
it prints and for its errors. Each line printed is the exit status of one. Nothing is computed here but Triton's hash of itself
and of the kernels' assembler, so that every child begins with what importing makes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import Any, NoReturn

import torch._dynamo  # noqa: F401, torch itself imports it late
import triton.compiler
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime.cache import triton_key

import paddock.assemble  # noqa: F401
from paddock.plugins import resolve
from paddock_triton import plugin

assert not triton.knobs.runtime.interpret, "what is interpreted is not compiled"


def _run(request: dict[str, Any]) -> NoReturn:
    """Be the module's process."""
    for name, number, flags in (
        ("/dev/null", 0, os.O_RDONLY),
        (request["out"], 1, os.O_WRONLY),
        (request["errors"], 2, os.O_WRONLY),
    ):
        os.dup2(os.open(name, flags), number)
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["words"]]
    status: Any = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def _prepare() -> None:
    """Import every kernel, and have Triton remember what takes a second of each process that compiles: it hashes itself."""
    for spec in plugin.paddock_ops():
        resolve(spec.implementation)
    for backend in plugin.paddock_attention_backends():
        resolve(backend.factory)
    triton_key()
    get_ptxas_version(90)


def main() -> None:
    """Run what is asked for, one after the other, until nothing is."""
    _prepare()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
