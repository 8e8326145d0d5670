"""Paddock: a plugin-based model-zoo runtime for large language models.

    from paddock import LLM, SamplingParams

    with LLM("models/smollm2-135m-instruct") as llm:
        for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=20)):
            print(output.text)

Public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddock.config import EngineConfig
    from paddock.errors import (
        CheckpointError,
        KernelError,
        ModelConfigError,
        OptionError,
        PaddockError,
        PlanError,
        PluginError,
        QualityError,
        QueueFullError,
        RequestError,
    )
    from paddock.llm import LLM
    from paddock.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, Timings

    __version__: str

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "EngineConfig",
    "KernelError",
    "Logprob",
    "ModelConfigError",
    "OptionError",
    "PaddockError",
    "PlanError",
    "PluginError",
    "QualityError",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Timings",
    "__version__",
]

_HOMES = {
    "config": ("EngineConfig",),
    "errors": (
        "CheckpointError",
        "KernelError",
        "ModelConfigError",
        "OptionError",
        "PaddockError",
        "PlanError",
        "PluginError",
        "QualityError",
        "QueueFullError",
        "RequestError",
    ),
    "llm": ("LLM",),
    "request": ("CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "Timings"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        """Return a public name, importing its module on first use."""
        import importlib

        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("paddock")
        elif name in _HOME_OF:
            value = getattr(importlib.import_module(f"paddock.{_HOME_OF[name]}"), name)
        else:
            raise AttributeError(f"module 'paddock' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*globals(), *__all__})
