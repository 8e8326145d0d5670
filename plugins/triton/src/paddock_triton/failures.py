"""What is said when a kernel does not compile or launch: its name, what it was given, why, and what to take instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

import attrs
import torch
from torch import Tensor
from triton.errors import TritonError

from paddock.errors import KernelError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

OTHER_ATTENTION = "choose the core's own: --attention-backend torch (attention_backend='torch')"


def named(kernel: str, *, fix: str | None = None) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that turns the failure of a kernel into a KernelError; nothing runs in its place.

    `fix` is the way out; None for an op, whose implementation an option names. Too little memory stays torch's own error,
    which the engine knows how to live with, and so does a fault the device reports of something that ran before.
    """
    other = fix or f"choose the core's own in plain torch: --op {kernel}=paddock (ops={{'{kernel}': 'paddock'}})"

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except (TritonError, RuntimeError) as error:
                if "out of memory" in str(error):  # as the driver says it at a launch
                    raise torch.OutOfMemoryError(f"kernel {kernel}: {_cause(error)}") from error
                given = signature(function).bind(*args, **kwargs).arguments
                raise KernelError(_message(kernel, given, error), fix=other) from error

        return guarded

    return decorate


def _message(kernel: str, given: dict[str, object], error: BaseException) -> str:
    tensors = ", ".join(text for name, value in given.items() for text in _described(name, value))
    return f"kernel {kernel} does not run on {tensors or 'no tensor'}: {_cause(error)}; nothing else was run in its place"


def _described(name: str, value: object) -> Iterator[str]:
    """Yield `x_TE [4, 64] bfloat16` for a tensor, and for each that an attrs value holds."""
    kind = type(value)
    if isinstance(value, Tensor):
        yield f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    elif attrs.has(kind):
        for field in attrs.fields(kind):
            yield from _described(f"{name}.{field.name}", getattr(value, field.name))


def _cause(error: BaseException) -> str:
    """Return what went wrong first, in one line: a compiler wraps the error of a callee, and quotes source before its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = getattr(error, "error_message", None) or str(error)
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
