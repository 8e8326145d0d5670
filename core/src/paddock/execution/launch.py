"""The seam between the engine and whatever computes its steps: one device, or a mesh of them."""

from __future__ import annotations

from typing import Protocol

from paddock.execution.memory import MemoryUse
from paddock.execution.prompt_logprobs import PromptWatcher
from paddock.scheduling.step import Step, StepResult


class InFlight(Protocol):
    """A step that was launched and may still be running."""

    @property
    def step(self) -> Step:
        """Return the step that was launched."""

    def result(self) -> StepResult:
        """Return what the step sampled; blocks until it has run."""


class Launcher(Protocol):
    """What the engine drives. `overlaps`: a launch returns before the step has run, so the next can be scheduled meanwhile."""

    @property
    def overlaps(self) -> bool:
        """Return whether `launch` returns early."""

    @property
    def vocab_size(self) -> int:
        """Return V; token ids lie in 0 .. V - 1."""

    @property
    def num_pages(self) -> int:
        """Return how many KV pages may be granted, counted from 0."""

    def launch(self, step: Step) -> InFlight:
        """Start the step, after all earlier ones, and return it in flight.

        Raises torch.OutOfMemoryError where the device lacks memory: the step then has not run, and its number comes again.
        Every sequence whose slot it touched is admitted anew before it runs.
        """

    def recover(self) -> None:
        """Wait for what runs and give back to the device what a launch that ran out of memory left."""

    def memory_use(self) -> MemoryUse | None:
        """Return what the launcher really takes of its device's memory (of several, the fullest); None where nobody counts."""

    def watch_prompts(self, watcher: PromptWatcher | None) -> None:
        """Show `watcher` (None: nobody) the logits of each prompt whose logprobs are asked for, from the next launch on."""

    def close(self) -> None:
        """Release what the launcher holds; nothing may be launched afterwards."""
