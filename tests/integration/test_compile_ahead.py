"""What a small Llama's first steps launch on a Hopper GPU has been compiled by then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_bench_startup import CONFIG

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "first_steps_for_hopper.py"
MODEL = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 3000, "max_position_embeddings": 256}


def test_the_first_steps_compile_nothing_more(tmp_path: Path) -> None:
    """The largest step, the first prompt and the first decode find every kernel, attention's and the sampler's included."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"_prefill", "_decode", "_cut", "_one_kernel", "_few_kernel", "_race_kernel", "_finish_kernel"} <= {*found["ahead"]}
    assert found["largest"] == []
    assert found["first request"] == []
