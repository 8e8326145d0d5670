"""The process whose start-up is measured: builds an engine, takes one request, gives one token, says a line at each step.

Run as `python -m paddock.bench.started OPTIONS`, OPTIONS a JSON object of EngineConfig's fields. A line is one JSON object, its
name in `event`; the reader takes the time a line arrives. An error a user can act on is the event `failed`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

from paddock.errors import PaddockError

# What the engine logs on its way, and the event it is here.
LOGGED = {"plan_resolved": "plan", "weights_ready": "weights", "engine_ready": "ready"}
PASSED_ON = ("seconds", "gib")  # of what it logs with them: numbers alone


def main(arguments: list[str]) -> int:
    """Return the exit code: 0, or 1 after the event `failed`."""
    options = json.loads(arguments[0])
    say("python")
    try:
        _run(options)
    except PaddockError as error:
        say("failed", message=error.message, fix=error.fix)
        return 1
    return 0


def say(event: str, **values: Any) -> None:
    """Write one event."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def _run(options: Mapping[str, Any]) -> None:
    _hear_the_log()
    from paddock.begin import import_assemble
    from paddock.config import EngineConfig
    from paddock.request import SamplingParams

    config = EngineConfig.from_options(**options)
    assemble = import_assemble(config.device)
    say("imports")
    engine = assemble(config)
    try:
        engine.add([0], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        say("accepted")
        while not any(output.finished for output in engine.step()):
            pass
        say("first_token")
        _say_facts(engine.plan)
    finally:
        engine.close()


def _hear_the_log() -> None:
    """Turn what the engine logs into events, and log nothing."""
    import structlog

    def hear(_: object, __: str, values: MutableMapping[str, Any]) -> NoReturn:
        if values.get("event") in LOGGED:
            say(LOGGED[values["event"]], **{name: values[name] for name in PASSED_ON if name in values})
        raise structlog.DropEvent

    structlog.configure(processors=[hear])


def _say_facts(plan: Any) -> None:
    from paddock.bench import conditions

    versions = {**conditions.versions(), **dict(conditions.distributions_of(plan))}
    weight_bytes = None if plan is None else plan.weight_bytes
    say(
        "facts",
        gpu=conditions.gpus(),
        plan=conditions.planned(plan),
        versions=versions,
        weight_bytes=weight_bytes,
        modules_without_bytecode=_without_bytecode(),
    )


def _without_bytecode() -> int:
    """Return how many modules were compiled from source for this start alone, as after an install that compiles none."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return sum(1 for spec in specs if spec is not None and spec.cached and not Path(spec.cached).exists())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
