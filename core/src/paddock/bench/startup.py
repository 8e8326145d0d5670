"""How long a process takes from nothing to its first request accepted and its first token, phase by phase."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import field, frozen

from paddock.bench.measure import median_known
from paddock.errors import PaddockError

CACHE_VARIABLE = "TRITON_CACHE_DIR"
EMPTY, WARM, AS_IS = "empty", "warm", "as-is"
KERNEL_CACHES = (EMPTY, WARM, AS_IS)

DEFINITIONS = {
    "accepted_seconds": ("first request accepted", "s", "from just before the process starts to its engine taking a request"),
    "first_token_seconds": ("first token", "s", "from just before the process starts to the first token of that request"),
    "python_seconds": ("python", "s", "of these: until the interpreter runs the program"),
    "imports_seconds": ("imports", "s", "then: until torch and the engine's modules are loaded"),
    "plan_seconds": ("plan", "s", "then: until plugins are found and the plan is made"),
    "weights_seconds": ("weights", "s", "then: until the weights are loaded; a GPU may still be drawing random ones"),
    "ready_seconds": ("ready", "s", "then: until KV pages, scheduler and runner stand"),
    "compute_seconds": ("first step", "s", "from the request accepted to its token: kernels compile or load here"),
}
_PHASES = ("python", "imports", "plan", "weights", "ready")  # in order; each lasts from the one before


@frozen(kw_only=True)
class Started:
    """One start: seconds since just before the spawn at which each event came, and what the process said of itself.

    `logged` is what the engine logged with an event, by the event: of `weights` the `seconds` that loading took.
    """

    seconds: Mapping[str, float]
    facts: Mapping[str, Any] = field(factory=dict)
    logged: Mapping[str, Mapping[str, Any]] = field(factory=dict)

    def figures(self) -> dict[str, float | None]:
        """Return every figure of DEFINITIONS, None where the events that bound it did not come."""
        at = self.seconds
        found: dict[str, float | None] = {f"{name}_seconds": at.get(name) for name in ("accepted", "first_token")}
        for before, name in zip((None, *_PHASES[:-1]), _PHASES, strict=True):
            found[f"{name}_seconds"] = _between(0.0 if before is None else at.get(before), at.get(name))
        found["compute_seconds"] = _between(at.get("accepted"), at.get("first_token"))
        return found


def child_command(options: Mapping[str, Any]) -> list[str]:
    """Return the command whose start-up is measured, for these EngineConfig fields."""
    return [sys.executable, "-m", "paddock.bench.started", json.dumps(dict(options))]


def start(command: Sequence[str], environment: Mapping[str, str], *, clock: Callable[[], float] = time.perf_counter) -> Started:
    """Return one start, timed on arrival of each event; raise PaddockError with the process's own words when it fails."""
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {}
    logged: dict[str, dict[str, Any]] = {}
    began = clock()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            now = clock() - began
            event = _event(line)
            if event.get("event") == "failed":
                raise PaddockError(str(event["message"]), fix=str(event["fix"]))
            if event.get("event") == "facts":
                facts = event
            elif "event" in event:
                name = str(event.pop("event"))
                seconds.setdefault(name, now)
                logged.setdefault(name, event)
        if child.wait() != 0 or "first_token" not in seconds:
            errors.seek(0)
            said = errors.read().strip()[-2000:] or "nothing"
            raise PaddockError(f"the process ended with {child.returncode} before its first token: {said}", fix="see above")
    return Started(seconds=seconds, facts=facts, logged=logged)


@contextmanager
def kernel_cache(kind: str, environ: Mapping[str, str] = os.environ) -> Iterator[Callable[[], dict[str, str]]]:
    """Yield what gives each start its environment: a fresh cache of compiled kernels, one for all of them, or the user's own."""
    with tempfile.TemporaryDirectory(prefix="paddock-kernels-") as folder:
        count = 0

        def environment() -> dict[str, str]:
            nonlocal count
            if kind == AS_IS:
                return dict(environ)
            count += 1
            cache = Path(folder) / ("warm" if kind == WARM else str(count))
            return {**environ, CACHE_VARIABLE: str(cache)}

        yield environment


def measured(
    command: Sequence[str], *, cache: str, runs: int, on_run: Callable[[int, Started], None] = lambda number, run: None
) -> list[Started]:
    """Return `runs` starts; with a warm cache an untimed one before them fills it."""
    with kernel_cache(cache) as environment:
        if cache == WARM:
            start(command, environment())
        found = []
        for number in range(runs):
            found.append(start(command, environment()))
            on_run(number, found[-1])
    return found


def summary(runs: Sequence[Started]) -> dict[str, float | None]:
    """Return the median over runs of every figure."""
    each = [run.figures() for run in runs]
    return {name: median_known([figures[name] for figures in each]) for name in DEFINITIONS}


def _between(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _event(line: str) -> dict[str, Any]:
    """Return the event a line holds, nothing for a line that holds none: a plugin may print what it likes."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
