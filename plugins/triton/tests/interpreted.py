"""Triton's interpreter without what it does over and over: half the time of the kernels' tests, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def change_the_language_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Let a launch alone put the interpreter's functions in the place of Triton's language, and each function that it calls not.

    They are there until it ends. A function that goes by a module of the language that its kernel does not is still seen to.
    """
    change: Callable[[Any], Any] = interpreter._patch_lang
    whole, core, changed = interpreter.tl, interpreter.tl.core, set[int]()

    def changed_once(function: Any) -> Any:
        known = {id(value) for value in function.__globals__.values() if value is whole or value is core}
        if known and known <= changed:
            return None  # a function in a kernel asks for no scope to end
        scope = change(function)
        restore = scope.restore

        def restored() -> None:
            changed.clear()
            restore()

        changed.update(known)
        scope.restore = restored
        return scope

    patch.setattr(interpreter, "_patch_lang", changed_once)


def look_dtypes_up_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter keep which numpy dtype each of Triton's types has."""
    look_up: Callable[[Any], Any] = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def kept(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = look_up(kind)
        return found[kind.name]

    patch.setattr(interpreter, "_get_np_dtype", kept)
