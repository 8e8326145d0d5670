"""Where a contribution comes from, and what became of a plugin that brought none."""

from __future__ import annotations

import re
import traceback
from typing import Generic, TypeVar

from attrs import field, frozen

from paddock.errors import PaddockError

GIVEN = "given in code"
Spec = TypeVar("Spec", covariant=True)


def normalised(name: str) -> str:
    """Return a distribution or plugin name as packaging compares it: `My_Plugin` is `my-plugin`."""
    return re.sub(r"[-_.]+", "-", name).lower()


@frozen(order=True)
class Provider:
    """A plugin by its entry-point name, and the distribution and version that installed it."""

    plugin: str
    distribution: str
    version: str = ""

    def __str__(self) -> str:
        """Return how messages name it: `paddock-llama 0.1.0 (plugin 'llama')`."""
        return " ".join(filter(None, (self.distribution, self.version, f"(plugin {self.plugin!r})")))

    def is_called(self, owner: str) -> bool:
        """Return whether a user who writes `owner` means this plugin, by its own or its distribution's name."""
        return normalised(owner) in (normalised(self.plugin), normalised(self.distribution))


@frozen
class Provided(Generic[Spec]):
    """A descriptor and who brought it."""

    spec: Spec
    provider: Provider


@frozen(eq=False)
class BrokenPlugin:
    """A plugin that was isolated: at which stage, why, and the way out. `error` keeps the traceback."""

    provider: Provider
    stage: str
    reason: str
    fix: str
    error: BaseException | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Return one line: who failed, where and why."""
        return f"{self.provider} failed at {self.stage}: {self.reason}"


def broken_by(provider: Provider, stage: str, error: BaseException) -> BrokenPlugin:
    """Return what to remember of a plugin that raised `error`."""
    if isinstance(error, PaddockError):
        return BrokenPlugin(provider, stage, error.message, error.fix, error)
    fix = f"repair, upgrade or uninstall {provider.distribution}" if provider.distribution != GIVEN else "repair the plugin"
    return BrokenPlugin(provider, stage, _in_one_line(error), fix, error)


def _in_one_line(error: BaseException) -> str:
    what = " ".join(" ".join(traceback.format_exception_only(error)).split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{what} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else what
