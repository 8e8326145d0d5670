"""What planning writes down while it decides, and the rule for whether something can run at all."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field, frozen

from paddock.planning.hardware import Hardware
from paddock.planning.plan import Choice, Rejected, Used
from paddock.plugins.descriptors import AttentionSpec, Issue, OpSpec, QuantizationSpec
from paddock.plugins.provider import Provider

ASKED = "asked for"


@frozen
class Candidate:
    """A value that may be chosen, and what speaks for it."""

    value: str
    reason: str


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


def why_not_here(spec: AttentionSpec | OpSpec | QuantizationSpec, hardware: Hardware, dtype: str) -> list[str]:
    """Return the reasons why what the spec describes cannot run on that hardware in that dtype; none when it can."""
    reasons = []
    if hardware.device not in spec.devices:
        reasons.append(f"runs on {_list(spec.devices)}, not on {hardware.device}")
    if dtype not in spec.dtypes:
        reasons.append(f"takes {_list(spec.dtypes)}, not {dtype}")
    least, have = spec.min_compute_capability, hardware.compute_capability
    if hardware.device == "cuda" and least is not None and (have is None or have < least):
        reasons.append(f"needs compute capability {_version(least)}, {hardware.name} has {_version(have) if have else 'none'}")
    return reasons


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
