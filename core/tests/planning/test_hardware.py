"""What a plan is made for: GPUs by name, and this machine's CPU as the kernel describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddock.errors import OptionError
from paddock.planning.hardware import GIB, MIB, bandwidth_of, gpu_device_files_exist, parse_gpus, this_cpu


@pytest.mark.parametrize(("text", "count"), [("H200", 1), ("2xH200", 2), ("2xh200", 2), (" 16 x H200 ", 16), ("4*H200", 4)])
def test_gpus_are_named_with_or_without_a_count(text: str, count: int) -> None:
    """`2xH200` is two H200s, in any case, with or without spaces."""
    hardware = parse_gpus(text)
    assert (hardware.count, hardware.name) == (count, "NVIDIA H200")
    assert hardware.memory_bytes == 143_771 * MIB
    assert hardware.compute_capability == (9, 0)


def test_names_with_a_size_are_known() -> None:
    """Sizes of one model are told apart."""
    assert parse_gpus("A100-40GB").memory_bytes < parse_gpus("a100").memory_bytes
    assert parse_gpus("RTX 4090").compute_capability == (8, 9)


@pytest.mark.parametrize(("text", "says"), [("H300", "h200"), ("0xH200", "at least 1"), ("", "known"), ("2x", "known")])
def test_unknown_gpus_are_refused_with_the_way_out(text: str, says: str) -> None:
    """An unknown name suggests the nearest one; no GPU at all is refused."""
    with pytest.raises(OptionError) as caught:
        parse_gpus(text)
    assert says in caught.value.fix


def test_bandwidth_is_found_by_the_name_a_driver_reports() -> None:
    """The longest known name within the reported one decides."""
    assert bandwidth_of("NVIDIA H200") == 4.8e12
    assert bandwidth_of("NVIDIA H100 NVL") == 3.9e12
    assert bandwidth_of("Unheard of") is None


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    """Return a root folder that describes a machine with 8 GiB, 6 of them free, and bfloat16 instructions."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {6 << 20} kB\n")
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Made CPU\nflags\t\t: fpu avx2 avx512_bf16\n")
    return tmp_path


def test_a_cpu_is_what_the_kernel_says(machine: Path) -> None:
    """Name, memory and instructions come from /proc."""
    hardware = this_cpu(machine)
    assert (hardware.device, hardware.name, hardware.count) == ("cpu", "Made CPU", 1)
    assert (hardware.memory_bytes, hardware.available_bytes) == (8 * GIB, 6 * GIB)
    assert hardware.bf16_instructions


def test_a_container_has_no_more_than_its_limit(machine: Path) -> None:
    """A control group's limit bounds memory, and what it uses already bounds what is available."""
    (machine / "sys/fs/cgroup").mkdir(parents=True)
    (machine / "sys/fs/cgroup/memory.max").write_text(f"{2 * GIB}\n")
    (machine / "sys/fs/cgroup/memory.current").write_text(f"{GIB // 2}\n")
    hardware = this_cpu(machine)
    assert (hardware.memory_bytes, hardware.available_bytes) == (2 * GIB, 3 * GIB // 2)


def test_an_unlimited_container_has_the_machine(machine: Path) -> None:
    """The limit `max` is none."""
    (machine / "sys/fs/cgroup").mkdir(parents=True)
    (machine / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert this_cpu(machine).memory_bytes == 8 * GIB


def test_a_machine_without_proc_still_has_memory(tmp_path: Path) -> None:
    """Where /proc is missing the C library is asked."""
    hardware = this_cpu(tmp_path)
    assert hardware.memory_bytes > 0
    assert not hardware.bf16_instructions


def test_gpus_are_seen_by_their_device_files(machine: Path) -> None:
    """A machine without device files has no GPU, and torch need not be asked."""
    assert not gpu_device_files_exist(machine)
    (machine / "dev").mkdir()
    (machine / "dev/nvidia0").touch()
    assert gpu_device_files_exist(machine)
