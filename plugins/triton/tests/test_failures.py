"""A kernel that does not compile or launch says which it was, what it was given, why, and what to take instead."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from paddock.errors import KernelError
from paddock.layers import LayerKV
from paddock_triton import ops_activation
from paddock_triton.failures import OTHER_ATTENTION, named

X_TE, PAGES = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(2, 16, 1, 8)


def compilation_error(message: str | None = "cannot add a pointer to a float", cause: Exception | None = None) -> Any:
    """Return the compiler's error at the second line of a kernel, raised by `cause`."""
    source = "def kernel(x):\n    return x + y\n"
    error = CompilationError(source, ast.parse(source).body[0].body[0].value, message)  # type: ignore[attr-defined]
    error.__cause__ = cause
    return error


def failing(error: BaseException, **options: Any) -> Any:
    """Return a function that raises the error, as a kernel's."""

    @named("rms_norm", **options)
    def function(x_TE: torch.Tensor, eps: float, *, kv: LayerKV | None = None) -> torch.Tensor:
        """Return nothing."""
        raise error

    return function


class Failing:
    """A kernel with a block too large."""

    def __getitem__(self, grid: Any) -> Any:
        """Return what launches it."""
        return self.launch

    def launch(self, *_: object, **__: object) -> None:
        """Fail."""
        raise OutOfResources(2, 1, "registers")


FAILURES = {
    "the compiler": (compilation_error(), "CompilationError: cannot add a pointer to a float"),
    "the compiler, in a function the kernel calls": (
        compilation_error(None, compilation_error(None, ValueError("\n  arange's range must be a power of 2\nmore"))),
        "ValueError: arange's range must be a power of 2",
    ),
    "a block too large": (OutOfResources(300_000, 232_448, "shared memory"), "OutOfResources: out of resource: shared memory"),
    "the assembler": (PTXASError("unknown target sm_42\nfor kernel"), "PTXASError: unknown target sm_42"),
    "the driver": (RuntimeError("Triton Error [CUDA]: invalid argument"), "RuntimeError: Triton Error [CUDA]: invalid argument"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_names_kernel_shapes_cause_and_way_out(name: str) -> None:
    """One line says all that; the original error is its cause."""
    error, says = FAILURES[name]
    with pytest.raises(KernelError) as caught:
        failing(error)(X_TE, 1e-6)
    assert caught.value.message.startswith("kernel rms_norm does not run on x_TE [4, 64] bfloat16: ")
    assert says in caught.value.message
    assert caught.value.message.endswith("nothing else was run in its place")
    assert "\n" not in caught.value.message
    assert "--op rms_norm=paddock" in caught.value.fix
    assert caught.value.__cause__ is error


def test_tensors_in_values_are_described_too() -> None:
    """Pages are named by the argument that holds them."""
    with pytest.raises(KernelError, match=r"kv\.k_pages_NPKD \[2, 16, 1, 8\] float32, kv\.v_pages_NPKD \[2, 16, 1, 8\] float32"):
        failing(RuntimeError("no"))(X_TE, 1e-6, kv=LayerKV(PAGES, PAGES))


def test_attention_has_a_way_out_of_its_own() -> None:
    """It is another backend, not an op."""
    with pytest.raises(KernelError) as caught:
        failing(RuntimeError("no"), fix=OTHER_ATTENTION)(X_TE, 1e-6)
    assert "--attention-backend torch" in caught.value.fix


@pytest.mark.parametrize("text", ["Triton Error [CUDA]: out of memory", "CUDA error: out of memory"])
def test_too_little_memory_is_torchs_own_error(text: str) -> None:
    """The engine takes the step back and goes on with smaller ones."""
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        failing(RuntimeError(text))(X_TE, 1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), torch.AcceleratorError("x"), AssertionError("x"), KeyError("x")])
def test_what_is_not_the_kernels_passes_unchanged(error: Exception) -> None:
    """Too little memory, a fault of something earlier, and our own bugs keep their names."""
    with pytest.raises(type(error)) as caught:
        failing(error)(X_TE, 1e-6)
    assert caught.value is error


def test_a_named_function_is_otherwise_what_it_was() -> None:
    """Name, docstring and result stay."""

    @named("twice")
    def twice(x: int) -> int:
        """Return twice x."""
        return 2 * x

    assert (twice(3), twice.__name__, twice.__doc__) == (6, "twice", "Return twice x.")


@pytest.mark.parametrize("op", ["silu_mul", "gelu"])
def test_activations_are_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says its op when its kernel fails."""
    monkeypatch.setattr(ops_activation, f"_{op}_kernel", Failing())
    with pytest.raises(KernelError, match=rf"^kernel {op} does not run on \w+ \[4, 64\] bfloat16"):
        getattr(ops_activation, op)(X_TE)
