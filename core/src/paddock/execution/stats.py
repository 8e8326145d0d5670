"""What an observer is told of a step: host-side numbers."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True)
class StepStats:
    """One committed step: its size, the queue after it, and seconds spent by the host.

    `launch_seconds` is the launch made in the same turn of the engine, which on a GPU is the next step's; `wait_seconds` what the
    host waited for the step's tokens.
    """

    number: int
    num_tokens: int
    num_decodes: int
    num_prefills: int
    num_running: int
    num_waiting: int
    schedule_seconds: float
    launch_seconds: float
    wait_seconds: float
    commit_seconds: float
