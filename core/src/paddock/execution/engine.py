"""The engine: schedule, launch, commit, by value. It works with token ids only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

import torch

from paddock.errors import RequestError
from paddock.execution.launch import InFlight, Launcher
from paddock.execution.memory import MemoryUse
from paddock.execution.prompt_logprobs import PromptWatcher
from paddock.execution.stats import StepStats
from paddock.request import Request
from paddock.scheduling.scheduler import Scheduler
from paddock.scheduling.step import SequenceUpdate, Step, StepResult

Observer = Callable[[StepStats], None]


class Engine:
    """Takes requests, runs them step by step and returns what each step gave them.

    Where the runner overlaps, step n + 1 is scheduled and launched while step n runs; else a step is committed at once. A step
    for which the device lacks memory is taken back, and smaller ones follow. A step that raises anything else ends every
    request, and the engine stays usable: the error is the device's or ours, never one request's, whose faults are found by
    `add` or show as unusable logits.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Launcher,
        observers: Sequence[Observer] = (),
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take over a scheduler and a runner; each observer is called once a committed step, with seconds by `clock`."""
        self._scheduler, self._runner = scheduler, runner
        self._observers, self._clock = tuple(observers), clock
        self._in_flight: InFlight | None = None

    @property
    def max_model_len(self) -> int:
        """Return how many tokens a sequence may have."""
        return self._scheduler.limits.max_model_len

    @property
    def has_work(self) -> bool:
        """Return whether a request has not ended or a step is in flight."""
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request; raise RequestError, with nothing changed, when it can never run or the queue is full."""
        check_token_ids(request, self._runner.vocab_size)
        self._scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or its sequence `index` alone, and return the last updates; none when unknown or ended already."""
        return self._scheduler.abort(request_id, index)

    def step(self) -> list[SequenceUpdate]:
        """Launch the next step, commit one that has run, and return what that one gave each sequence."""
        with self._undone_together():
            times = [self._clock()]
            step = self._scheduler.schedule()
            times.append(self._clock())
            launched, updates = self._launch(step)
            arrived, self._in_flight = (self._in_flight, launched) if self._runner.overlaps else (launched, None)
            times.append(self._clock())
            result = arrived.result() if arrived else StepResult([])
            times.append(self._clock())
            updates += self._scheduler.commit(arrived.step, result) if arrived else []
            self._observe(arrived, times)
        return updates

    def memory_use(self) -> MemoryUse | None:
        """Return what the runner really takes of its device's memory, None where nobody counts."""
        return self._runner.memory_use()

    def watch_prompts(self, watcher: PromptWatcher | None) -> None:
        """Show `watcher` (None: nobody) the logits of each prompt whose logprobs are asked for, from the next step on."""
        self._runner.watch_prompts(watcher)

    def close(self) -> None:
        """End every request and release the runner; closing twice is closing once."""
        self._scheduler.fail()
        self._in_flight = None
        self._runner.close()

    def _launch(self, step: Step | None) -> tuple[InFlight | None, list[SequenceUpdate]]:
        """Return the step in flight; or, where the device lacks memory for it, the updates of having taken it back."""
        if step is None:
            return None, []
        with suppress(torch.OutOfMemoryError):
            return self._runner.launch(step), []
        self._runner.recover()  # now that the error is gone, whose traceback kept the launch's tensors
        return None, self._scheduler.take_back(step)

    @contextmanager
    def _undone_together(self) -> Iterator[None]:
        """End every request if anything raises: the scheduler counts on each step having run, the caller on its updates."""
        try:
            yield
        except BaseException:
            self._in_flight = None
            self._scheduler.fail()
            raise

    def _observe(self, arrived: InFlight | None, times: list[float]) -> None:
        if not self._observers or arrived is None:
            return
        step, times = arrived.step, [*times, self._clock()]
        schedule, launch, wait, commit = (after - before for before, after in pairwise(times))
        stats = StepStats(
            number=step.number,
            num_tokens=step.num_tokens,
            num_decodes=len(step.decode_slots),
            num_prefills=len(step.prefills),
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            schedule_seconds=schedule,
            launch_seconds=launch,
            wait_seconds=wait,
            commit_seconds=commit,
        )
        for observer in self._observers:
            observer(stats)


def check_token_ids(request: Request, vocab_size: int) -> None:
    """Raise RequestError when a prompt, logit bias or bad word names a token outside the vocabulary."""
    named = (
        ("its prompt", request.prompt_token_ids),
        ("logit_bias", (token for token, _ in request.params.logit_bias)),
        ("a bad word", (token for word in request.bad_words_ids for token in word)),
    )
    for where, token_ids in named:
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"request {request.request_id!r} has token id {token} in {where}: the vocabulary has {vocab_size}",
                    fix=f"give ids from 0 to {vocab_size - 1}",
                )
