"""Several ranks in one process: threads that sum and join tensors as a group of GPUs would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
_TIMEOUT = 30.0  # seconds after which a rank that waits for a lost one gives up


class ThreadCommunicator:
    """One rank's end of a group of threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Tensor | None]) -> None:
        """Share `barrier` and `board` (one place a rank) with the others."""
        self._rank, self._barrier, self._board = rank, barrier, board

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors."""
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the ranks' tensors joined along the last axis."""
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._board[self._rank] = x
        self._barrier.wait(_TIMEOUT)
        everyone = [tensor for tensor in self._board if tensor is not None]
        self._barrier.wait(_TIMEOUT)
        return everyone


def run_ranks(world: int, work: Callable[[int, ThreadCommunicator], R]) -> list[R]:
    """Return work(rank, communicator) of every rank, run at the same time; the first failure is raised."""
    barrier = threading.Barrier(world)
    board: list[Tensor | None] = [None] * world

    def run(rank: int) -> R:
        try:
            return work(rank, ThreadCommunicator(rank, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as threads:
        futures = [threads.submit(run, rank) for rank in range(world)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
