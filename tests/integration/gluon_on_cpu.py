"""Gluon kernels of roles, run on a CPU as threads: each role one, the copy engine another, in whatever order they come.

What a module takes of Gluon is replaced by what does the same with tensors of torch: barriers have arrivals, bytes to come and
phases, copies arrive late and in any order, memory that nobody wrote holds NaN. Registers, layouts and instructions are not
looked at. A wait that lasts longer than a kernel could take is an error: so a deadlock is.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

PATIENCE, GLANCE = 60.0, 0.2  # seconds: until a wait has failed, and between looks at whether another program has
_FAILED = threading.Event()
_KEPT = {
    "static_range": range,
    "minimum": min,
    "float32": torch.float32,
    "int64": torch.int64,
    "float8e4nv": torch.float8_e4m3fn,
    "zeros_like": torch.zeros_like,
    "split": lambda values: values.unbind(-1),
    "div_rn": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}
_TRITON = SimpleNamespace(
    exp2=torch.exp2,
    rsqrt=torch.rsqrt,
    float32=torch.float32,
    clamp=lambda x, low, high, propagate_nan: torch.clamp(x, low, high),
    PropagateNan=SimpleNamespace(ALL=None),
)


class Sums(torch.Tensor):
    """A tensor that is a value, as a kernel's are: adding to it makes another."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        """Return the sum."""
        return self + other

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]
        """Return the product."""
        return self * other


class Pointer:
    """A place in memory, or a tensor of places."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory.view(-1), at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        """Return the places so much further on."""
        return Pointer(self.memory, self.at + offset)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def index(self, at: int) -> Shared:
        """Return one of what lies there."""
        return Shared(self.values[at])

    def slice(self, start: int, size: int, dim: int = 0) -> Shared:
        """Return a range of it."""
        return Shared(self.values.narrow(dim, int(start), int(size)))

    def permute(self, order: tuple[int, ...]) -> Shared:
        """Return it with its sides in another order."""
        return Shared(self.values.permute(order))

    def _reinterpret(self, _dtype: object, shape: list[int], _layout: object) -> Shared:
        return Shared(self.values.view(list(map(int, shape))))

    def load(self, _layout: object) -> Tensor:
        """Return what is there."""
        return self.values.clone().as_subclass(Sums)

    def store(self, values: Tensor) -> None:
        """Write all of it."""
        self.values.copy_(values)


class Barrier:
    """A barrier in shared memory: a phase ends with its last arrival, or the last byte it was told of."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.ended = 0

    def add(self, arrivals: int, size: int) -> None:
        """Take arrivals and bytes that will come, or, below 0, have."""
        with self.changed:
            self.pending, self.bytes = self.pending - arrivals, self.bytes + size
            assert self.pending >= 0, "more arrive than a phase has"
            if self.pending == self.bytes == 0:
                self.pending, self.ended = self.count, self.ended + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        """Return once the phase of that parity has ended."""
        with self.changed:
            for _ in range(int(PATIENCE / GLANCE)):
                if self.changed.wait_for(lambda: self.ended & 1 != parity, GLANCE):
                    return
                assert not _FAILED.is_set(), "another program has failed"
        raise AssertionError("nobody ends a barrier's phase")


class Source:
    """A tensor as the copy engine sees it: blocks that are zero beyond its edges."""

    dtype = torch.float32

    def __init__(self, operand: Tensor, shape: list[int], strides: list[int], block: list[int], _layout: object) -> None:
        assert all(stride * operand.element_size() % 16 == 0 for stride in strides[:-1]), "rows that no copy begins at"
        self.operand, self.block = operand.as_strided(shape, strides), block

    def copied(self, place: list[int], into: Shared) -> int:
        """Copy a block and return its bytes."""
        assert list(into.values.shape) == self.block
        found = self.operand[tuple(slice(at, at + size) for at, size in zip(place, self.block, strict=True))].float()
        into.values.zero_()
        into.values[tuple(slice(size) for size in found.shape)] = found
        return into.values.numel() * self.operand.element_size()


class Device:
    """What runs a kernel's programs: so many at once as there are multiprocessors, and what they have in common."""

    def __init__(self, seed: int) -> None:
        self.draw, self.here, self.lock = random.Random(seed), threading.local(), threading.Lock()
        self.before_has_ended, self.done = threading.Event(), threading.Event()
        self.early, self.waiting, self.asked = threading.Condition(), 0, 0
        self.copies: list[Callable[[], None]] = []
        self.failures: list[BaseException] = []

    def together(self, works: Sequence[Callable[[], None]], place: tuple[int, int]) -> None:
        """Do all at once, for a program of so many."""

        def one(work: Callable[[], None]) -> None:
            self.here.program, self.here.programs = place
            try:
                work()
            except BaseException as error:
                self.failures.append(error)
                _FAILED.set()

        threads = [threading.Thread(target=one, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def copy(self) -> None:
        """Be the copy engine: take what waits in any order."""
        while not self.done.is_set():
            with self.lock:
                chosen = self.copies.pop(self.draw.randrange(len(self.copies))) if self.copies else None
            if chosen is None:
                time.sleep(1e-4)  # lets another thread run
            else:
                chosen()

    def run(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Run a kernel's programs all at once."""
        _FAILED.clear()
        given = [Pointer(each) if isinstance(each, Tensor) else each for each in arguments]
        works = [partial(self.together, [partial(kernel, *given, **options)], (each, programs)) for each in range(programs)]
        engine = threading.Thread(target=self.copy, daemon=True)
        engine.start()
        self.together(works, (0, 0))
        self.done.set()
        engine.join()
        for error in self.failures[:1]:
            raise error

    def run_behind(
        self, last: Callable[[], None], kernel: Any, programs: int, arguments: Any, options: Any, **early: int
    ) -> None:
        """Run a kernel that starts while the one before it still runs, which does `last` when `end_before` says."""
        before = threading.Thread(target=self.end_before, args=(last,), kwargs=early, daemon=True)
        before.start()
        self.run(kernel, programs, arguments, options)
        before.join()

    def end_before(self, last: Callable[[], None], *, waiting: int, asked: int) -> None:
        """Be the kernel before: do `last` only when so many roles wait for it and so many copies have been asked for."""
        with self.early:
            self.early.wait_for(lambda: self.waiting == waiting and self.asked >= asked, PATIENCE)
        if (self.waiting, min(self.asked, asked)) != (waiting, asked):
            self.failures.append(AssertionError(f"{self.waiting} of {waiting} roles wait, {self.asked} of {asked} copies"))
        last()
        self.before_has_ended.set()

    def pretend(self, patch: pytest.MonkeyPatch, modules: list[ModuleType]) -> None:
        """Have these modules take this device's words for Gluon's, and call their functions as Python's."""
        words = {
            "gl": self._language(),
            "tl": _TRITON,
            "tma": self._tma(),
            "mbarrier": self._mbarrier(),
            "TensorDescriptor": Source,
        }
        words |= {"role_barrier": lambda: None, "fence_async_shared": lambda: None, "gdc_launch_dependents": lambda: None}
        words |= {"gdc_wait": self._wait_for_before, "warpgroup_mma": _multiplied, "warpgroup_mma_wait": _waited}
        for module in modules:
            for name, value in list(vars(module).items()):
                if name in words:
                    patch.setattr(module, name, words[name])
                elif type(value).__name__ == "constexpr":
                    patch.setattr(module, name, value.value)
                elif hasattr(value, "fn") and type(value).__module__.startswith("triton"):
                    patch.setattr(module, name, value.fn)

    def _wait_for_before(self) -> None:
        with self.early:
            self.waiting += 1
            self.early.notify_all()
        assert self.before_has_ended.wait(PATIENCE), "the kernel before never ends"

    def _language(self) -> Any:
        device = self

        class Language:
            def __getattr__(self, name: str) -> Any:
                return _KEPT.get(name, lambda *_, **__: None)  # of layouts nothing

            program_id = staticmethod(lambda _axis: device.here.program)
            num_programs = staticmethod(lambda _axis: device.here.programs)
            arange = staticmethod(lambda start, stop, _layout=None: torch.arange(start, stop))
            zeros = staticmethod(lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype).as_subclass(Sums))
            convert_layout = staticmethod(lambda values, *_, **__: values)
            load, store = staticmethod(_load), staticmethod(_store)

            @staticmethod
            def allocate_shared_memory(dtype: torch.dtype, shape: list[int], _layout: object) -> Any:
                if dtype == torch.int64:
                    made = [Barrier() for _ in range(shape[0])]
                    return SimpleNamespace(index=made.__getitem__)
                return Shared(torch.full(list(map(int, shape)), torch.nan))

            @staticmethod
            def atomic_add(at: Pointer, number: int, sem: str) -> int:
                assert sem == ("release" if number else "acquire")
                with device.lock:
                    found = int(at.memory[at.at])
                    at.memory[at.at] += number
                device.hold_on()
                return found

            @staticmethod
            def warp_specialize(roles: list[Any], warps: list[int], _registers: object) -> None:
                assert len(roles) == len(warps) + 1
                works = [partial(work, *given) for work, given in roles]
                device.together(works, (device.here.program, device.here.programs))

        return Language()

    def hold_on(self) -> None:
        """Let others run, unless one of them failed: what it would have done never comes."""
        assert not self.failures, "another role failed"
        time.sleep(0)

    def _tma(self) -> Any:
        def copy(source: Source, place: list[int], barrier: Barrier, into: Shared) -> None:
            with self.lock:
                self.copies.append(lambda: barrier.add(0, -source.copied(place, into)))
            with self.early:
                self.asked += 1
                self.early.notify_all()

        return SimpleNamespace(async_copy_global_to_shared=copy, tensor_descriptor=None)

    def _mbarrier(self) -> Any:
        def init(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.pending = count

        return SimpleNamespace(
            init=init,
            MBarrierLayout=lambda: None,
            wait=Barrier.wait,
            expect=lambda barrier, size: barrier.add(1, size),
            arrive=lambda barrier: barrier.add(1, 0),
        )


def _load(at: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Tensor:
    place = torch.as_tensor(at.at)
    if mask is None:
        return at.memory[place].as_subclass(Sums)
    mask = torch.as_tensor(mask)
    return torch.where(mask, at.memory[torch.where(mask, place, 0)], other).as_subclass(Sums)


def _store(at: Pointer, values: Any, mask: Any = None) -> None:
    place, values = torch.as_tensor(at.at), torch.as_tensor(values, dtype=at.memory.dtype)
    values = values.expand(place.shape)
    inside = torch.ones_like(place, dtype=torch.bool) if mask is None else mask
    at.memory[place[inside]] = values[inside].as_subclass(Tensor)


def _multiplied(a: Shared, b: Shared, sums: Tensor, *, use_acc: bool, is_async: bool) -> Tensor:
    assert is_async
    products = a.values @ b.values
    return (sums + products if use_acc else products).as_subclass(Sums)


def _waited(_outstanding: int, deps: list[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)
