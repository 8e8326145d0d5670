"""Inside `compile_ahead` nothing is launched and each kernel is asked for once; outside it launches are what they were."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import build
from triton.tools.tensor_descriptor import TensorDescriptor

from paddock.testing.oracle import poisoned
from paddock_triton import launch as launching
from paddock_triton.launch import compile_ahead, launch, launches_nothing
from paddock_triton.ops_activation import silu_mul
from paddock_triton.ops_linear import linear


class Kernel:
    """Notes launches, and what it is asked to compile."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """Return what launches it."""
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> None:
        """Note the arguments."""
        self.compiled.append((grid, args, options))


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be asked for where Triton's interpreter would compile none; Triton itself does not start."""
    monkeypatch.setattr(launching, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    monkeypatch.setattr(launching, "_LEAST_PROCESSES", sys.maxsize)
    monkeypatch.setattr(launching, "_start_triton", lambda: None)


def test_a_launch_passes_everything_on() -> None:
    """Grid, arguments and options."""
    kernel = Kernel()
    launch(kernel, (3, 2), 1, "x", num_warps=4)
    assert kernel.launched == [((3, 2), (1, "x"), {"num_warps": 4})]
    assert not kernel.compiled


@pytest.mark.usefixtures("compiles")
def test_each_kernel_is_asked_for_once(device: torch.device) -> None:
    """Another tensor of the same kind asks for nothing new; another dtype, alignment, integer or option does."""
    kernel, other, x_T = Kernel(), Kernel(), torch.zeros(16, device=device)
    block = TensorDescriptor(x_T.view(4, 4), [4, 4], [4, 1], [2, 4])
    with compile_ahead(device):
        for tensor in (x_T, torch.ones(64, device=device)):
            launch(kernel, (len(tensor),), tensor, 16, num_warps=4)
        assert len(kernel.compiled) == 1
        for args in ((x_T.half(), 16), (x_T[1:], 16), (x_T, 17), (x_T, True), (None, 16), (block, 16)):
            launch(kernel, (1,), *args, num_warps=4)
        launch(kernel, (1,), x_T, 16, num_warps=8)
        launch(other, (1,), x_T, 16, num_warps=4)
    assert (len(kernel.compiled), len(other.compiled)) == (8, 1)
    assert not kernel.launched


def test_nothing_is_launched_inside(device: torch.device) -> None:
    """An op returns memory that nobody wrote, a product the library's included, and computes again afterwards."""
    x_TE, weight_OE = torch.ones(100, 64, device=device), torch.ones(8, 64, device=device)
    with compile_ahead(device), poisoned():
        assert launches_nothing()
        assert silu_mul(x_TE).isnan().all()
        assert linear(x_TE, weight_OE).shape == (100, 8)
    assert not launches_nothing()
    torch.testing.assert_close(silu_mul(x_TE), torch.nn.functional.silu(x_TE[:, :32]))
    assert (linear(x_TE, weight_OE) == 64).all()


def test_an_error_inside_ends_the_context(device: torch.device) -> None:
    """Launches are launches again."""
    with pytest.raises(KeyError), compile_ahead(device):
        raise KeyError("x")
    assert not launches_nothing()


LAUNCHER = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&definition); }
"""


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler")
def test_a_kernel_keeps_its_launcher_when_another_s_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers all bear one name; one loaded a second time would otherwise put its functions in the place of the last one's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sources = [LAUNCHER.replace("NUMBER", str(number)) for number in (1, 2)]

    def load(number: int) -> Any:
        return build.compile_module_from_src(sources[number], "__triton_launcher")

    with launching._launchers_apart():
        _, other, _ = load(0), load(1), load(0)
        assert other.launch() == 2
