"""What begins while torch is imported: the GPU where there is to be one, and nothing that a mere import asked for."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paddock import begin


class Driver:
    """A driver that notes its calls; `failing` is the one that does not succeed."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        """Return a function of the driver's."""

        def call(*_: object) -> int:
            self.calls.append(name)
            return int(name == self._failing)

        return call


def started_by(code: str) -> dict[str, Any]:
    """Return what a new process says of itself after `code`, in which torch stands for one built for GPUs."""
    script = f"""
import gc, json, sys
from paddock import begin
begun = []
begin._make_context = lambda: begun.append(1)
begin._torch_knows_gpus = lambda: True
{code}
print(json.dumps(dict(begun=len(begun), torch="torch" in sys.modules, kept=gc.get_freeze_count() > 0, collects=gc.isenabled())))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_paddock_starts_nothing() -> None:
    """Neither the package nor its front door loads torch or asks for a GPU."""
    found = started_by("import paddock; paddock.LLM")
    assert found == {"begun": 0, "torch": False, "kept": False, "collects": True}


@pytest.mark.parametrize(("device", "begun"), [("auto", 1), ("cuda", 1), ("cpu", 0)])
def test_a_gpu_is_started_where_one_may_be_used(device: str, begun: int) -> None:
    """While torch is imported; the garbage collector then leaves modules alone and is on again."""
    found = started_by(f"begin.import_assemble({device!r})")
    assert found == {"begun": begun, "torch": True, "kept": True, "collects": True}


def test_where_torch_is_loaded_there_is_nothing_to_begin() -> None:
    """The import is done, and the process is the caller's own: its objects are not touched."""
    found = started_by("import torch; begin.import_assemble('cuda')")
    assert found == {"begun": 0, "torch": True, "kept": False, "collects": True}


def test_a_collector_that_was_off_stays_off() -> None:
    """Whoever turned it off wants it off."""
    assert not started_by("gc.disable(); begin.import_assemble('cpu')")["collects"]
    assert gc.isenabled()


def test_the_context_is_the_first_gpus_primary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is torch's own, retained."""
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    begin._make_context()
    assert driver.calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet"])
def test_a_driver_that_fails_is_left_to_torch(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised and nothing more is tried."""
    driver = Driver(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    begin._make_context()
    assert driver.calls[-1] == failing


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU has none."""

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    begin._make_context()


@pytest.mark.parametrize("built", [True, False])
def test_a_torch_without_gpus_starts_none(built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context would take the memory of a GPU that nobody uses."""
    library = tmp_path / "lib" / "libtorch_cuda.so"
    library.parent.mkdir()
    if built:
        library.touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})()
    monkeypatch.setattr(begin, "find_spec", lambda name: spec)
    assert begin._torch_knows_gpus() == built
