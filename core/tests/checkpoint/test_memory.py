"""Loading keeps one copy of the weights in memory and little else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, COLUMNS, COUNT = 2560, 1024, 29  # 29 tensors of 10.5 MB in float32, 304 MB
LIMIT = 1.15

# The peak is read from the kernel's high-water mark of the process itself: getrusage also counts the parent it was forked from.
LOADER = """
import sys, torch
from pathlib import Path
from paddock.checkpoint.load import load
from paddock.checkpoint.targets import Target

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder, dtype, rows, columns, count = Path(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
def target(name, rows):
    view = torch.empty(rows, columns, dtype=dtype)
    return Target(name=name, view=view, shape=(rows, columns), region=((0, rows), (0, columns)))
load(folder / "small", [target("w", 8)])
before = peak()
targets = [target(f"layers.{i}.w", rows) for i in range(count)]
load(folder, targets)
print((peak() - before) / sum(target.view.nbytes for target in targets))
"""


def write_zeros(folder: Path, shapes: dict[str, list[int]]) -> None:
    """Write a float32 checkpoint of zeros as a file with holes, which takes no time and no disk."""
    header, position = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [position, position + 4 * rows * columns]}
        position += 4 * rows * columns
    head = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(folder / "model.safetensors", 8 + len(head) + position)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_stays_near_one_copy_of_the_weights(tmp_path: Path, dtype: str) -> None:
    """Loading 304 MB, as stored or converted to half of that, raises the peak by the parameters' bytes and under 15 % more."""
    write_zeros(tmp_path, {f"layers.{i}.w": [ROWS, COLUMNS] for i in range(COUNT)})
    write_zeros(tmp_path / "small", {"w": [8, COLUMNS]})
    command = [sys.executable, "-c", LOADER, str(tmp_path), dtype, *map(str, (ROWS, COLUMNS, COUNT))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 0.95 < float(result.stdout) < LIMIT
