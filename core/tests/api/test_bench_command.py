"""`paddock bench`, and the arithmetic of its figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from core.tests.api.conftest import Make, Run

from paddock.bench.measure import DEFINITIONS, Workload, summary, thinning, warm_up
from paddock.bench.measure import Run as TimedRun
from paddock.errors import PaddockError
from paddock.planning.padding import padded_sizes
from paddock.request import CompletionOutput, Request, RequestOutput, Timings


def _counting(request: Request) -> list[int]:
    return [5] * 1000


def _output(arrived: float, times: list[float], isl: int = 10) -> RequestOutput:
    part = CompletionOutput(index=0, text="", token_ids=[5] * len(times), token_times=times)
    return RequestOutput(
        request_id="", prompt=None, prompt_token_ids=[1] * isl, outputs=[part], finished=True, timings=Timings(arrived=arrived)
    )


def test_figures_follow_their_definitions() -> None:
    """Rates are tokens over the wall; latencies come from the times of arrival and of each token."""
    run = TimedRun(wall=2.0, outputs=(_output(1.0, [1.5, 1.6, 1.8]), _output(1.0, [1.7, 1.8, 3.0])))
    figures = run.figures()
    assert (figures["isl"], figures["osl"]) == (10, 3)
    assert (figures["output_tokens_per_second"], figures["total_tokens_per_second"], figures["requests_per_second"]) == (3, 13, 1)
    assert figures["ttft_median_ms"] == pytest.approx(600)
    assert figures["ttft_p99_ms"] == pytest.approx(700)
    assert figures["itl_median_ms"] == pytest.approx(150)
    assert figures["itl_p99_ms"] == pytest.approx(1200)
    assert figures["e2e_median_ms"] == pytest.approx(1400)
    assert figures["request_output_tokens_per_second"] == pytest.approx((3 / 0.8 + 3 / 2.0) / 2)
    assert set(DEFINITIONS) <= set(figures)


def test_a_summary_is_the_median_of_runs() -> None:
    """Each figure's median over the runs; one that no run has stays unknown."""
    runs = [TimedRun(wall=wall, outputs=(_output(0.0, [1.0]),)) for wall in (1.0, 4.0, 2.0)]
    assert summary(runs)["wall_seconds"] == 2.0
    assert summary(runs)["itl_median_ms"] is None


def test_prompts_are_random_and_repeatable() -> None:
    """The same seed gives the same uniform token ids, another seed others."""
    work = Workload(requests=50, isl=20, osl=1, seed=0, at_once=True)
    prompts = work.prompts(300)
    assert prompts == work.prompts(300)
    assert prompts != Workload(requests=50, isl=20, osl=1, seed=1, at_once=True).prompts(300)
    assert len({token for prompt in prompts for token in prompt}) > 250
    assert all(0 <= token < 300 for prompt in prompts for token in prompt)


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_a_bench_reports_what_really_ran(make: Make, run: Run, kind: str) -> None:
    """JSON holds every figure, the sizes asked for and produced, every run, versions and the command."""
    arguments = ("--requests", "3", "--isl", "4", "--osl", "5", "--runs", "2", "--json")
    result = run(make(_counting), "bench", kind, "model", *arguments)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert (report["requests"], report["isl"], report["osl"], report["asked_osl"]) == (3, 4, 5, 5)
    assert report["at_once"] == (kind == "throughput")
    assert len(report["runs"]) == 2
    assert set(DEFINITIONS) <= set(report)
    assert set(report["definitions"]) == set(DEFINITIONS)
    assert set(report["versions"]) == {"paddock", "torch", "triton", "cuda", "python"}
    assert {"gpu", "plan", "commit", "date", "command"} <= set(report)
    assert report["roof_tokens_per_second"] is report["percent_of_roof"] is None
    assert report["roof"] == {"none_because": "no plan is known"}


def test_a_commit_may_be_said(make: Make, run: Run) -> None:
    """What the user calls the source stands in place of what git says."""
    result = run(make(_counting), "bench", "latency", "model", "--isl", "2", "--osl", "2", "--commit", "v9", "--json")
    assert json.loads(result.stdout)["commit"] == "v9"


def test_the_warm_up_runs_what_the_timed_run_uses(make: Make) -> None:
    """As many requests with short prompts, then a few as long as the timed ones, twice."""
    seen: dict[str, int] = {}  # by request: the script is asked again at each of its tokens

    def remembering(request: Request) -> list[int]:
        seen[request.request_id] = len(request.prompt_token_ids)
        return _counting(request)

    warm_up(make(remembering), Workload(requests=5, isl=100, osl=50, seed=0, at_once=True))
    assert list(seen.values()) == [32] * 5 + [100] * 4
    seen.clear()
    warm_up(make(remembering), Workload(requests=3, isl=20, osl=50, seed=0, at_once=False))
    assert list(seen.values()) == [20] * 4


@pytest.mark.parametrize("requests", [1, 2, 7, 100, 300])
def test_the_warm_up_meets_every_size_of_a_step(requests: int) -> None:
    """Requests that start together end so that every padded size decodes once: a timed run has none left to capture."""
    lengths = thinning(requests)
    assert len(lengths) == requests
    decoding = [sum(length > token for length in lengths) for token in range(1, max(lengths))]
    assert sorted(decoding) == padded_sizes(requests)


def test_the_warm_up_stays_within_the_length_of_the_timed_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests would thin out over more tokens than there is room for."""
    outputs: list[int] = []
    llm = make(_counting)
    generate = llm.generate

    def remembering(*given: Any, **how: Any) -> Any:
        found = generate(*given, **how)
        outputs.extend(len(output.token_ids) for output in found)
        return found

    monkeypatch.setattr(llm, "generate", remembering)
    warm_up(llm, Workload(requests=100, isl=4, osl=5, seed=0, at_once=True))
    assert max(outputs) == 5


def test_every_run_is_shown_and_a_ledger_needs_a_plan(make: Make, run: Run) -> None:
    """The text gives each run's rate beside the median; without a plan nothing was predicted, and that is said."""
    arguments = ("--requests", "2", "--isl", "4", "--osl", "2", "--runs", "3", "--ledger")
    result = run(make(_counting), "bench", "throughput", "model", *arguments)
    (line,) = (line for line in result.stdout.splitlines() if "of each run" in line)
    assert len(line.split(": ")[1].split(", ")) == 3
    assert "no bytes were predicted" in result.stderr


def test_every_figure_is_printed_with_its_definition(make: Make, run: Run) -> None:
    """The table defines what it shows."""
    result = run(make(_counting), "bench", "throughput", "model", "--requests", "2", "--isl", "4", "--osl", "1")
    assert "2 requests, all at once, 4 tokens in" in result.stdout
    for label, unit, meaning in DEFINITIONS.values():
        assert label in result.stdout
        assert f"{unit:9} {meaning}" in result.stdout


def test_a_request_that_falls_short_is_an_error(make: Make, run: Run) -> None:
    """A figure from fewer tokens than asked for would not be that figure."""
    result = run(make(lambda _: [5, 5]), "bench", "throughput", "model", "--osl", "5", "--isl", "2")
    assert isinstance(result.exception, PaddockError)
    assert "2 tokens instead of 5" in str(result.exception)
