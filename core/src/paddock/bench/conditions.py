"""What a figure depends on: device, versions, source, date, command, and what the plan chose."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import paddock
from paddock.planning.plan import Plan
from paddock.planning.serial import fingerprint

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DRIVER = re.compile(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s")


def circumstances(*, distributions: Sequence[tuple[str, str]] = (), commit: str | None = None) -> dict[str, Any]:
    """Return what a measurement in this process says of itself; `distributions` are plugins as (name, version).

    `commit` names the source where its folder is no git checkout, or to say it in other words.
    """
    return {**own_circumstances(commit=commit), "versions": {**versions(), **dict(sorted(distributions))}}


def own_circumstances(*, commit: str | None = None) -> dict[str, Any]:
    """Return when, by which command and with which source a measurement was made; no torch is needed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["paddock", *sys.argv[1:]]),
        "commit": commit or source_commit(Path(paddock.__file__)),
    }


def gpus() -> dict[str, Any] | None:
    """Return name, memory and number of this machine's GPUs, and their driver where it says so; None without any."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "installed": torch.cuda.device_count(),
        "driver": driver_version(),
    }


def driver_version(file: Path = _DRIVER_FILE) -> str | None:
    """Return the version the driver's kernel module states, None where there is none."""
    try:
        found = _DRIVER.search(file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def source_commit(file: Path) -> str | None:
    """Return the commit of the checkout that tracks `file`, ending in `-dirty` where that was changed; None for no checkout."""
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def planned(plan: Plan | None) -> dict[str, Any] | None:
    """Return what the plan chose that a figure depends on, None where there is no plan."""
    if plan is None:
        return None
    return {
        "fingerprint": fingerprint(plan),
        "hardware": str(plan.hardware),
        "gpus_used": plan.num_gpus if plan.hardware.device == "cuda" else 0,
        "dtype": plan.dtype,
        "quantization": plan.scheme,
        "fp8_inputs_from": plan.fp8_inputs_from,
        "fp8_weights_from": plan.fp8_weights_from,
        "keeps_fp8_weights": plan.keeps_fp8_weights,
        "kv_cache_dtype": plan.kv_cache_dtype,
        "attention_compute": plan.attention_compute,
        "fp8_accumulation": plan.fp8_accumulation,
        "page_size": plan.page_size,
        "attention_backend": plan.attention.name,
        "graphs": plan.graphs,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "pipeline_parallel_size": plan.pipeline_parallel_size,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
        "ops": {spec.op: spec.implementation for spec in plan.ops},
    }


def distributions_of(plan: Plan | None) -> list[tuple[str, str]]:
    """Return (distribution, version) of every plugin a plan relies on."""
    return [] if plan is None else sorted({(used.distribution, used.version) for used in plan.plugins})


def versions() -> dict[str, str | None]:
    """Return the versions of what every figure depends on, None for what is not installed."""
    import torch

    return {
        "paddock": _installed("paddock"),
        "torch": str(torch.__version__),
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
