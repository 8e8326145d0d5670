"""Kernels compiled ahead are compiled by processes beside this one, or by its threads where those cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plugins.triton.tests.apart import run

pytest.importorskip("triton")

FEW_KERNELS = {"_ring_kernel", "_rms_norm_kernel", "_race_kernel", "_finish_kernel"}
KERNELS = FEW_KERNELS | {"_int4_kernel", "_cut", "_decode", "_prefill_async"}
OWN = "_own_kernel"  # the script's own, which no other process can import


def _compiled(cache: Path, *words: str) -> tuple[dict[str, Any], str]:
    """Return what the script prints, with such a cache, and what it says beside that."""
    result = run("plugins.triton.tests.compile_in_processes", *words, environment={"TRITON_CACHE_DIR": str(cache)})
    assert result.returncode == 0, result.stderr[-3000:]
    *logged, found = result.stdout.splitlines()
    return json.loads(found), "\n".join(logged) + result.stderr


def test_processes_compile_what_the_cache_does_not_hold(tmp_path: Path) -> None:
    """Every kernel but the script's own is read from the cache, those in Gluon and with descriptors too; no process is left.

    With that cache none is started again.
    """
    found, _ = _compiled(tmp_path)
    assert found["here"] == [OWN]
    assert {*found["cached"]} >= KERNELS
    assert found["started"] > 0
    assert found["left"] == 0
    again, _ = _compiled(tmp_path)
    assert again["here"] == []
    assert {*again["cached"]} == {*found["cached"], OWN}
    assert again["started"] == 0


def test_threads_compile_where_processes_have_ended(tmp_path: Path) -> None:
    """Nothing is lost but time, and a warning says so."""
    found, said = _compiled(tmp_path, "dead")
    assert {*found["here"]} >= FEW_KERNELS | {OWN}
    assert found["cached"] == []
    assert "RuntimeWarning: kernels compile in threads" in said
