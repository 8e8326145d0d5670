"""What a plan is made for: a kind of device, how many, how large. Free of torch, so a plan needs no GPU."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from attrs import field, frozen, validators

from paddock.errors import OptionError, did_you_mean

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_COUNTED = re.compile(r"(?:(\d+)\s*[xX*]\s*)?(\S.*?)\s*\Z")
_MEMINFO = re.compile(r"(\w+):\s+(\d+) kB")
# What makes bfloat16 quicker than float32 on a CPU: instructions that multiply it.
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@frozen(kw_only=True)
class Hardware:
    """`count` equal devices: `memory_bytes` each, of which `available_bytes` were free when looked at.

    `bandwidth` is the vendor's figure for memory, bytes a second, None where unknown. `bf16_instructions` says that a CPU
    multiplies bfloat16 itself.
    """

    device: str = field(validator=validators.in_(("cpu", "cuda")))
    name: str
    count: int = field(default=1, validator=validators.ge(1))
    memory_bytes: int = field(validator=validators.ge(1))
    available_bytes: int = field(validator=validators.ge(0))
    compute_capability: tuple[int, int] | None = None
    bandwidth: float | None = None
    bf16_instructions: bool = False

    def __str__(self) -> str:
        """Return `2 x NVIDIA H200 (140.4 GiB each)`."""
        each = " each" if self.count > 1 else ""
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{times}{self.name} ({self.memory_bytes / GIB:.1f} GiB{each})"


@frozen
class KnownGpu:
    """A GPU's published figures: total memory as the driver reports it, compute capability, memory bandwidth."""

    name: str
    memory_mib: int
    compute_capability: tuple[int, int]
    terabytes_per_second: float


# Total memory in MiB as `nvidia-smi` reports it; bandwidth from the vendor's data sheets.
KNOWN_GPUS = {
    "b200": KnownGpu("NVIDIA B200", 183_359, (10, 0), 8.0),
    "h200": KnownGpu("NVIDIA H200", 143_771, (9, 0), 4.8),
    "h100": KnownGpu("NVIDIA H100 80GB", 81_559, (9, 0), 3.35),
    "h100-nvl": KnownGpu("NVIDIA H100 NVL", 95_830, (9, 0), 3.9),
    "a100": KnownGpu("NVIDIA A100 80GB", 81_920, (8, 0), 2.039),
    "a100-40gb": KnownGpu("NVIDIA A100 40GB", 40_960, (8, 0), 1.555),
    "l40s": KnownGpu("NVIDIA L40S", 46_068, (8, 9), 0.864),
    "l4": KnownGpu("NVIDIA L4", 23_034, (8, 9), 0.3),
    "rtx-4090": KnownGpu("NVIDIA GeForce RTX 4090", 24_564, (8, 9), 1.008),
}


def parse_gpus(text: str) -> Hardware:
    """Return the hardware `H200` or `2xH200` names; raise OptionError for an unknown GPU or a count below 1."""
    match = _COUNTED.match(text.strip())
    count, name = (int(match[1] or 1), match[2]) if match else (1, text)
    known = KNOWN_GPUS.get(name.lower().replace(" ", "-").replace("_", "-"))
    if known is None:
        raise OptionError(f"unknown GPU {name!r}", fix=did_you_mean(name.lower(), KNOWN_GPUS) + " (write H200 or 2xH200)")
    if count < 1:
        raise OptionError(f"{text!r} asks for {count} GPUs", fix="ask for at least 1, as in 2xH200")
    return Hardware(
        device="cuda",
        name=known.name,
        count=count,
        memory_bytes=known.memory_mib * MIB,
        available_bytes=known.memory_mib * MIB,
        compute_capability=known.compute_capability,
        bandwidth=known.terabytes_per_second * 1e12,
    )


def bandwidth_of(name: str) -> float | None:
    """Return the published memory bandwidth of the GPU with that device name, or None when it is not in the table."""
    lowered = name.lower().replace(" ", "-")
    keys = sorted((key for key in KNOWN_GPUS if key in lowered), key=len)
    return KNOWN_GPUS[keys[-1]].terabytes_per_second * 1e12 if keys else None


def gpu_device_files_exist(root: Path = Path("/")) -> bool:
    """Return whether the operating system shows any NVIDIA device, so that a machine without one need not ask further."""
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev/dxg").exists()


def this_cpu(root: Path = Path("/")) -> Hardware:
    """Return this machine's CPU and memory: the smaller of what is installed and what the control group allows."""
    meminfo = {name: int(kib) << 10 for name, kib in _MEMINFO.findall(_read(root / "proc/meminfo"))}
    total = meminfo.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = meminfo.get("MemAvailable", total)
    limit, used = _number(root / "sys/fs/cgroup/memory.max"), _number(root / "sys/fs/cgroup/memory.current")
    if limit is not None:
        total, available = min(total, limit), max(0, min(available, limit - (used or 0)))
    cpuinfo = _read(root / "proc/cpuinfo")
    return Hardware(
        device="cpu",
        name=_cpu_name(cpuinfo),
        memory_bytes=total,
        available_bytes=available,
        bf16_instructions=bool(_BF16_INSTRUCTIONS & _flags(cpuinfo)),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.machine() or "cpu"


def _flags(cpuinfo: str) -> frozenset[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()
