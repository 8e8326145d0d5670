"""Loading keeps one copy of the weights in memory and little else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, COLUMNS, COUNT = 2560, 1024, 29  # 29 tensors of 10.5 MB in float32, 304 MB
LIMIT = 1.15
QUANTISED_LIMIT = 1.4  # of 76 MB: the readers' buffers weigh more beside them, and one tensor a reader would be 1.55

# The peak is read from the kernel's high-water mark of the process itself: getrusage also counts the parent it was forked from.
LOADER = """
import sys, torch
from pathlib import Path
from paddock.checkpoint.load import load
from paddock.checkpoint.targets import RowQuantiser, Target

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder, dtype, rows, columns, count = Path(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
def target(name, rows):
    view = torch.empty(rows, columns, dtype=dtype)
    halve = lambda rows: (rows.to(dtype), rows[:, :1].float())
    quantiser = RowQuantiser(convert=halve, scales=torch.empty(rows, 1), dtype="float32") if dtype.itemsize == 1 else None
    return Target(name=name, view=view, shape=(rows, columns), region=((0, rows), (0, columns)), rows=quantiser)
load(folder / "small", [target("w", 8)])
before = peak()
targets = [target(f"layers.{i}.w", rows) for i in range(count)]
load(folder, targets)
print((peak() - before) / sum(target.view.nbytes for target in targets))
"""


def write_zeros(folder: Path, shapes: dict[str, list[int]]) -> None:
    """Write a float32 checkpoint of zeros as a file with holes, which takes no time and no disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    head = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(folder / "model.safetensors", 8 + len(head) + position)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", LIMIT), ("bfloat16", LIMIT), ("float8_e4m3fn", QUANTISED_LIMIT)])
def test_peak_memory_stays_near_one_copy_of_the_weights(tmp_path: Path, dtype: str, limit: float) -> None:
    """Loading 304 MB as stored, converted to half or quantised to a quarter raises the peak by the parameters and little."""
    write_zeros(tmp_path, {f"layers.{i}.w": [ROWS, COLUMNS] for i in range(COUNT)})
    write_zeros(tmp_path / "small", {"w": [8, COLUMNS]})
    command = [sys.executable, "-c", LOADER, str(tmp_path), dtype, *map(str, (ROWS, COLUMNS, COUNT))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 0.95 < float(result.stdout) < limit


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
ENGINE = """
import sys, torch
from pathlib import Path
from paddock.assemble import build_engine, plan
from paddock.config import EngineConfig

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def build(folder):
    made = plan(EngineConfig(model=folder, device="cpu", dtype=sys.argv[3], max_num_seqs=1))
    return made, build_engine(made, Path(folder))

build(sys.argv[1])
before = peak()
made, engine = build(sys.argv[2])
print((peak() - before) / made.weight_bytes)
"""


def llama_shapes(*, layers: int, inner: int, vocab: int) -> dict[str, list[int]]:
    """Return the tensors of a tied Llama as wide as CONFIG's."""
    wide = 768
    shapes = {"model.embed_tokens.weight": [vocab, wide], "model.norm.weight": [wide]}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": [wide, wide] for name in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": [inner, wide] for name in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = [wide, inner]
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": [wide] for name in ("input", "post_attention")}
    return shapes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_building_an_engine_stays_near_what_its_plan_counts(tmp_path: Path, dtype: str) -> None:
    """Reading, packing for a CPU's kernels and allocating pages: 330 or 165 MB of weights, and under 25 % more at the peak."""
    pytest.importorskip("paddock_llama")
    for name, layers, inner, vocab in (("small", 1, 64, 128), ("large", 10, 2048, 8192)):
        write_zeros(tmp_path / name, llama_shapes(layers=layers, inner=inner, vocab=vocab))
        sizes = {"num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocab}
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG | sizes))
    command = [sys.executable, "-c", ENGINE, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 0.9 < float(result.stdout) < 1.25, result.stdout
