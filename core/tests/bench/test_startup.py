"""Start-up is timed from just before the spawn, event by event, with the kernel cache that was asked for."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from paddock.bench.startup import (
    AS_IS,
    CACHE_VARIABLE,
    DEFINITIONS,
    EMPTY,
    WARM,
    Started,
    child_command,
    kernel_cache,
    measured,
    start,
    summary,
)
from paddock.errors import PaddockError

EVENTS = ("python", "imports", "plan", "weights", "ready", "accepted", "first_token")
SAYS_ALL = "".join(f"print('{json.dumps({'event': event})}', flush=True)\n" for event in EVENTS)


def child(program: str) -> list[str]:
    """Return a process that runs a program instead of an engine."""
    return [sys.executable, "-c", program]


def test_phases_lie_between_events() -> None:
    """Each phase lasts from the event before it; the first from the spawn."""
    at = dict(zip(EVENTS, (0.5, 2.0, 2.25, 7.0, 7.5, 8.0, 11.0), strict=True))
    figures = Started(seconds=at).figures()
    assert (figures["accepted_seconds"], figures["first_token_seconds"]) == (8.0, 11.0)
    phases = [figures[f"{name}_seconds"] for name in ("python", "imports", "plan", "weights", "ready", "compute")]
    assert phases == [0.5, 1.5, 0.25, 4.75, 0.5, 3.0]
    assert set(figures) == set(DEFINITIONS)


def test_a_phase_whose_events_did_not_come_is_unknown() -> None:
    """An engine that logs less gives fewer phases, and a median is over those that are known."""
    known, unknown = Started(seconds={"plan": 1.0, "first_token": 2.0}), Started(seconds={"first_token": 4.0})
    assert known.figures()["imports_seconds"] is None
    assert summary([known, unknown])["first_token_seconds"] == 3.0
    assert summary([known, unknown])["weights_seconds"] is None


def test_events_are_timed_on_arrival() -> None:
    """The clock is read before the spawn and at each line; lines that are no events pass."""
    ticks = iter(range(100))
    found = start(child("print('hello')\nprint('3')\n" + SAYS_ALL), {}, clock=lambda: float(next(ticks)))
    assert list(found.seconds) == list(EVENTS)
    assert found.seconds["python"] == 3.0
    assert found.seconds["first_token"] == 9.0


def test_what_an_event_brings_is_kept_with_it() -> None:
    """Of an event that comes twice, with the first."""
    first, again = (json.dumps({"event": "weights", "seconds": seconds}) for seconds in (1.5, 9.0))
    found = start(child(f"print('{first}')\nprint('{again}')\n" + SAYS_ALL), {})
    assert found.logged["weights"] == {"seconds": 1.5}
    assert found.logged["plan"] == {}


def test_an_error_of_the_process_is_the_users() -> None:
    """What the process could say of its failure is raised as it would have been here."""
    event = json.dumps({"event": "failed", "message": "no such model", "fix": "name another"})
    with pytest.raises(PaddockError, match="no such model") as caught:
        start(child(f"import sys\nprint('''{event}''')\nsys.exit(1)"), {})
    assert caught.value.fix == "name another"


def test_a_process_that_dies_is_quoted() -> None:
    """Its last words are in the error."""
    with pytest.raises(PaddockError, match="out of luck"):
        start(child("raise SystemExit('out of luck')"), {})


def test_a_kernel_cache_is_fresh_kept_or_the_users() -> None:
    """Empty: another folder each time; warm: one for all; as-is: whatever the environment says."""
    for kind, folders in ((EMPTY, 3), (WARM, 1)):
        with kernel_cache(kind, {"A": "b", CACHE_VARIABLE: "/mine"}) as environment:
            given = [environment() for _ in range(3)]
        assert len({each[CACHE_VARIABLE] for each in given}) == folders
        assert all(each["A"] == "b" and each[CACHE_VARIABLE] != "/mine" for each in given)
    with kernel_cache(AS_IS, {CACHE_VARIABLE: "/mine"}) as environment:
        assert environment() == {CACHE_VARIABLE: "/mine"}


def test_a_warm_cache_is_filled_by_a_start_that_does_not_count(tmp_path: Path) -> None:
    """Two timed runs are three starts with a warm cache, two with an empty one."""
    starts = tmp_path / "starts"
    program = f"with open({str(starts)!r}, 'a') as file: file.write('x')\n" + SAYS_ALL
    assert len(measured(child(program), cache=WARM, runs=2)) == 2
    assert starts.read_text() == "xxx"
    assert len(measured(child(program), cache=EMPTY, runs=2)) == 2
    assert starts.read_text() == "xxxxx"


def test_the_process_is_told_the_engines_options() -> None:
    """Options travel as one JSON argument."""
    *_, options = child_command({"model": "m", "prefer": {"a": "b"}})
    assert json.loads(options) == {"model": "m", "prefer": {"a": "b"}}


def test_modules_compiled_for_this_start_alone_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose bytecode is not where Python would keep it is one more; one whose bytecode is kept is not."""
    from paddock.bench.started import _without_bytecode

    before = _without_bytecode()
    for name, kept in (("kept", True), ("lost", False)):
        spec = spec_from_file_location(f"a_module_that_is_{name}", tmp_path / f"{name}.py")
        assert spec is not None
        spec.cached = str(tmp_path / f"{name}.pyc")
        if kept:
            Path(spec.cached).touch()
        monkeypatch.setitem(sys.modules, spec.name, module_from_spec(spec))
    assert _without_bytecode() == before + 1
