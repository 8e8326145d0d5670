"""What planning writes down while it decides, and the rule for whether something can run at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from attrs import define, field, frozen

from paddock.planning.hardware import Hardware
from paddock.planning.plan import Choice, Rejected, Used
from paddock.plugins.descriptors import AttentionSpec, Issue, OpSpec, QuantizationSpec
from paddock.plugins.provider import Provider

ASKED = "asked for"
_LISTED = 10


@frozen
class Candidate:
    """A value that may be chosen, and what speaks for it."""

    value: str
    reason: str


@frozen
class Obstacle:
    """Why something cannot serve, and what would let it: an empty `fix` where nothing a user can change would."""

    reason: str
    fix: str = ""


@define
class Notes:
    """The decisions, findings and plugins of one plan in the making."""

    choices: list[Choice] = field(factory=list)
    issues: list[Issue] = field(factory=list)
    used: list[Used] = field(factory=list)

    def choose(self, name: str, value: object, reason: str, rejected: Iterable[Rejected] = ()) -> None:
        """Write down a decision."""
        self.choices.append(Choice(name=name, value=str(value), reason=reason, rejected=tuple(rejected)))

    def find(self, level: str, code: str, message: str, fix: str = "") -> None:
        """Write down an issue of level `error`, `warning` or `info`."""
        self.issues.append(Issue(level=level, code=code, message=message, fix=fix))

    def use(self, role: str, name: str, provider: Provider) -> None:
        """Write down that the plan relies on a plugin."""
        self.used.append(
            Used(role=role, name=name, plugin=provider.plugin, distribution=provider.distribution, version=provider.version)
        )


def listed(said: str, cases: Sequence[str]) -> str:
    """Return a sentence and the first ten of its cases, a line each, and how many more there are."""
    rest = [f"and {len(cases) - _LISTED} more"] if len(cases) > _LISTED else []
    return "\n    ".join([said, *cases[:_LISTED], *rest])


def why_not_here(spec: AttentionSpec | OpSpec | QuantizationSpec, hardware: Hardware, dtype: str) -> list[Obstacle]:
    """Return what keeps what the spec describes from running on that hardware in that dtype; nothing when it can.

    Packages are looked for where the plan is made, and not imported.
    """
    found = []
    if hardware.device not in spec.devices:
        found.append(Obstacle(f"runs on {_list(spec.devices)}, not on {hardware.device}", f"run on {_any_of(spec.devices)}"))
    if dtype not in spec.dtypes:
        found.append(Obstacle(f"takes {_list(spec.dtypes)}, not {dtype}", f"set dtype to {_any_of(spec.dtypes)}"))
    least, have = spec.min_compute_capability, hardware.compute_capability
    if hardware.device == "cuda" and least is not None and (have is None or have < least):
        reason = f"needs compute capability {_version(least)}, {hardware.name} has {_version(have) if have else 'none'}"
        found.append(Obstacle(reason, f"use a GPU of compute capability {_version(least)} or later"))
    missing = () if isinstance(spec, QuantizationSpec) else (name for name in spec.requires if not is_installed(name))
    found += [Obstacle(f"needs the package {name}, which is not installed", f"pip install {name}") for name in missing]
    return found


def is_installed(package: str) -> bool:
    """Return whether a top-level package can be imported, without importing it; a mere folder of its name does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def reasons(obstacles: Iterable[Obstacle]) -> str:
    """Return why something cannot serve, in one line."""
    return "; ".join(obstacle.reason for obstacle in obstacles)


def ways_around(obstacles: Iterable[Obstacle]) -> str:
    """Return what would let it serve, in one line; empty where nothing would."""
    obstacles = tuple(obstacles)
    return "; ".join(obstacle.fix for obstacle in obstacles) if all(obstacle.fix for obstacle in obstacles) else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _any_of(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
