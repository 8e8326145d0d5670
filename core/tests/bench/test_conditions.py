"""A figure says what it depends on, and memory is shown as predicted and as measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from core.tests.planning import made

from paddock.bench.against_roof import beside_roof
from paddock.bench.conditions import circumstances, distributions_of, driver_version, planned, source_commit
from paddock.bench.ledgers import compared, ledger_report
from paddock.bench.measure import Workload
from paddock.execution.memory import MemoryUse
from paddock.planning.hardware import parse_gpus
from paddock.planning.padding import MIXED_GRAPHS, padded_sizes

WORK = Workload(requests=8, isl=16, osl=4, seed=0, at_once=True)


def git(folder: Path, *words: str) -> str:
    """Return what git says in a folder."""
    who = ("-c", "user.name=n", "-c", "user.email=e@x")
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_that_tracks_the_source(tmp_path: Path) -> None:
    """A changed checkout is `-dirty`; a file that git does not track, as an installed package's, has no commit."""
    tracked, strange = tmp_path / "a.py", tmp_path / "b.py"
    tracked.write_text("1")
    strange.write_text("2")
    assert source_commit(tracked) is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(tracked) == commit
    assert source_commit(strange) is None
    tracked.write_text("3")
    assert source_commit(tracked) == f"{commit}-dirty"


def test_a_driver_states_its_version(tmp_path: Path) -> None:
    """The open and the closed kernel module both do; without one nothing is known."""
    file = tmp_path / "version"
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.12.01  Tue Jan  1 00:00:00 UTC 2030",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.12.01  Release Build  (x@y)",
    ):
        file.write_text(line)
        assert driver_version(file) == "570.12.01"
    assert driver_version(tmp_path / "none") is None


def test_circumstances_name_versions_date_and_command() -> None:
    """Plugins stand among the versions; what is said of the source stands as it is."""
    found = circumstances(distributions=[("acme-cow", "1.0")], commit="mine")
    assert found["versions"]["acme-cow"] == "1.0"
    assert {"paddock", "torch", "triton", "cuda", "python"} <= set(found["versions"])
    assert found["commit"] == "mine"
    assert found["date"].endswith("+00:00")
    assert found["command"].startswith("paddock")


def test_a_plan_is_told_in_short() -> None:
    """What decides speed is there, and every plugin the plan relies on."""
    plan = made.planned()
    facts = planned(plan)
    assert facts is not None
    assert (facts["attention_backend"], facts["graphs"], facts["kv_cache_dtype"], facts["page_size"]) == (
        "quick",
        plan.graphs,
        "bfloat16",
        64,
    )
    assert len(facts["fingerprint"]) == 64
    assert planned(None) is None
    assert any(name == "paddock" for name, _ in distributions_of(plan))


def test_a_figure_stands_beside_its_roof() -> None:
    """On a known GPU the share is the figure over the roof; requests at once are no more than run at once."""
    plan = made.planned({}, parse_gpus("H200"), max_num_seqs=2)
    found = beside_roof(plan, WORK, 1000.0)
    assert found["percent_of_roof"] == pytest.approx(100 * 1000.0 / found["roof_tokens_per_second"])
    assert found["roof_requests_per_second"] == pytest.approx(found["roof_tokens_per_second"] / WORK.osl)
    assert found["roof_total_tokens_per_second"] == pytest.approx(found["roof_requests_per_second"] * (WORK.isl + WORK.osl))
    assert found["roof"]["terms"]["at_once"] == 2
    assert found["roof"]["ceilings"]["bytes_per_second"] == 4.3e12
    assert found["roof"]["formula"]
    cpu = beside_roof(made.planned({}, made.cpu()), WORK, 1000.0)
    assert cpu["roof_tokens_per_second"] is cpu["percent_of_roof"] is None
    assert cpu["roof"]["none_because"]


def test_one_at_a_time_has_the_roof_of_one() -> None:
    """Requests given in turn never share a read of the weights."""
    plan = made.planned({}, parse_gpus("H200"))
    alone = beside_roof(plan, Workload(requests=8, isl=16, osl=4, seed=0, at_once=False), None)
    assert alone["roof"]["terms"]["at_once"] == 1
    assert alone["percent_of_roof"] is None
    assert alone["roof_tokens_per_second"] < beside_roof(plan, WORK, None)["roof_tokens_per_second"]


def test_the_ledger_is_held_beside_what_was_measured() -> None:
    """Each amount with its difference in percent, and the totals of both."""
    ledger = made.planned(kv_cache_memory_bytes=1 << 20).ledger
    use = MemoryUse(
        weight_bytes=ledger.weights.total * 2, kv_bytes=ledger.kv_bytes, workspace_bytes=0, graph_bytes=5, peak_bytes=9,
        reserved_bytes=9,
    )  # fmt: skip
    entries = {entry.name: entry for entry in compared(ledger, use)}
    assert entries["weights"].difference_percent == pytest.approx(100)
    assert entries["KV"].difference_percent == 0
    assert entries["workspace"].difference_percent == pytest.approx(-100)
    assert entries["total"].measured == 2 * ledger.weights.total + ledger.kv_bytes + 5
    assert entries["total"].predicted == ledger.fixed_bytes + ledger.kv_bytes


def test_what_the_allocator_holds_beside_is_measured_too() -> None:
    """What it has of the device and nobody uses is no page's: a prediction that leaves it out is that much too high."""
    ledger = made.planned(kv_cache_memory_bytes=1 << 20).ledger
    use = MemoryUse(weight_bytes=40, kv_bytes=30, workspace_bytes=20, graph_bytes=5, peak_bytes=95, reserved_bytes=102)
    entries = {entry.name: entry for entry in compared(ledger, use)}
    assert (entries["gaps"].predicted, entries["gaps"].measured, entries["total"].measured) == (0, 7, 102)


def test_what_was_not_measured_is_unknown() -> None:
    """Without a measurement the predictions stand alone."""
    report = ledger_report(made.planned(), None)
    assert report is not None
    assert report["measured"] is False
    assert {entry["measured"] for entry in report["entries"].values()} == {None}
    assert ledger_report(None, None) is None


def test_graphs_are_said_to_be_predicted_for_every_shape() -> None:
    """A run that captured a few shapes measures a fraction of it: the reader is told, and how many shapes there are."""
    report = ledger_report(made.planned({}, parse_gpus("H200"), max_num_seqs=2), None)
    assert report is not None
    assert set(report["definitions"]) == set(report["entries"])
    shapes = len(padded_sizes(2)) + MIXED_GRAPHS
    assert f"all {shapes} shapes" in report["definitions"]["graphs"]
    assert "met and captured" in report["definitions"]["graphs"]
