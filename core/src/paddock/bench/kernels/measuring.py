"""Every op and attention backend that serves here, a row a size: right or wrong, its time, and what that is of the limit.

A case is checked, then timed in a captured graph, then torch's own call likewise; its twin last and least, for its time judges
nothing. What a case took on the wall stands in its row, so that the slow one of a long run is found.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from attrs import evolve, frozen

from paddock import log
from paddock.bench.kernels import library
from paddock.bench.kernels.attention_cases import SMALL_STEPS, STEPS, Laid, Step, case_name, laid_out
from paddock.bench.kernels.case import ATTENTION, Case, Draw
from paddock.bench.kernels.op_cases import FULL, SMALL, OpCases
from paddock.bench.kernels.rows import Planned, Row
from paddock.bench.kernels.timing import FEW, Sets, argument_sets, seconds
from paddock.bench.kernels.verdict import Verdict, attention_verdict, op_verdict
from paddock.config import FP8_ATTENTION, PLAIN_ATTENTION
from paddock.errors import OptionError, did_you_mean
from paddock.layers import torch_dtype
from paddock.layers.reference import FP8
from paddock.planning.backends import Question
from paddock.planning.hardware import Hardware
from paddock.planning.notes import Obstacle, reasons, ways_around, why_not_here
from paddock.planning.roofs import Ceilings, ceilings_of
from paddock.plugins import AttentionSpec, OpSpec, resolve
from paddock.plugins.discovery import BUILTIN
from paddock.plugins.provider import Provided
from paddock.plugins.registry import Registry


@frozen(eq=False, kw_only=True)
class Bench:
    """What is measured, on what: the registry's kernels on one device, in one dtype of activations; `quick` for small sizes."""

    registry: Registry
    hardware: Hardware
    dtype: str = "bfloat16"
    quick: bool = False

    @property
    def device(self) -> torch.device:
        """Return where kernels run."""
        return torch.device(self.hardware.device)

    @property
    def ceilings(self) -> Ceilings | None:
        """Return what the device can do at best, None where that is not known."""
        return ceilings_of(self.hardware.name) if self.hardware.device == "cuda" else None

    def ops(self, names: Collection[str] = ()) -> list[Provided[OpSpec]]:
        """Return the implementations to measure; the core's own only of an op nobody else serves here."""
        known = {each.spec.op for each in self.registry.ops}
        _refuse_unknown("op", names, known)
        serving = [each for each in self.registry.ops if not why_not_here(each.spec, self.hardware, self.dtype)]
        chosen = [each for each in serving if not names or each.spec.op in names]
        others = {each.spec.op for each in chosen if each.provider.plugin != BUILTIN}
        return [each for each in chosen if each.provider.plugin != BUILTIN or each.spec.op not in others]

    def backends(self, names: Collection[str] = ()) -> list[Provided[AttentionSpec]]:
        """Return the attention backends to measure; the core's own where it is named, or nobody else serves here.

        Raises OptionError for a name that is not known, and for a backend that is named and does not serve.
        """
        _refuse_unknown("attention backend", names, {each.spec.name for each in self.registry.attention_backends})
        why_not = [(each, why_not_here(each.spec, self.hardware, self.dtype)) for each in self.registry.attention_backends]
        serving = [each for each, obstacles in why_not if not obstacles]
        if names:
            absent = set(names) - {each.spec.name for each in serving}
            _refuse_unfit([(each.spec.name, obstacles) for each, obstacles in why_not if each.spec.name in absent])
            return [each for each in serving if each.spec.name in names]
        return [each for each in serving if each.provider.plugin != BUILTIN] or serving

    def without_cases(self, ops: Collection[Provided[OpSpec]]) -> list[str]:
        """Return the ops no size is known for."""
        return sorted({each.spec.op for each in ops if not self._op_cases(each.spec.op)})

    def op_cases(self, provided: Provided[OpSpec]) -> list[Planned]:
        """Return a row a size of one implementation, each measured when it is asked to be."""
        spec = provided.spec
        implementation, twin = resolve(spec.implementation), resolve(self._twin_of(spec.op))
        measure = _OpMeasure(bench=self, op=spec.op, call=implementation, twin=twin, library=library.OPS.get(spec.op))
        row = partial(Row, subject=spec.op, implementation=spec.implementation, plugin=provided.provider.plugin)
        return [
            Planned(row=row(case=case.name), measure=partial(self._row, partial(_made, case, measure)))
            for case in self._op_cases(spec.op)
        ]

    def attention_cases(self, provided: Provided[AttentionSpec]) -> list[Planned]:
        """Return a row a step and KV type that the backend serves, each laid out and measured when it is asked to be."""
        spec = provided.spec
        row = partial(Row, subject=ATTENTION, implementation=spec.name, plugin=provided.provider.plugin)
        planned = []
        for step, kv in itertools.product(SMALL_STEPS if self.quick else STEPS, (self.dtype, "fp8")):
            page = step.page or spec.page_sizes[0]
            compute = FP8_ATTENTION if step.in_fp8 else PLAIN_ATTENTION
            question = Question(hardware=self.hardware, dtype=self.dtype, needs=step.needs(), block_size=page, compute=compute)
            if not question.why_not(spec, kv) and (kv == "fp8" or not step.in_fp8):
                name = case_name(step, page_size=page, fp8_pages=kv == "fp8")
                laid = partial(self._laid, step, spec, page, kv)
                planned.append(Planned(row=row(case=name), measure=partial(self._row, laid)))
        return planned

    def _laid(self, step: Step, spec: AttentionSpec, page: int, kv: str) -> tuple[Case, _AttentionMeasure]:
        kv_dtype = FP8 if kv == "fp8" else torch_dtype(kv)
        laid = laid_out(step, page_size=page, kv_dtype=kv_dtype, draw=self._draw)
        return laid.case, _AttentionMeasure(bench=self, laid=laid, step=step, spec=spec)

    @torch.inference_mode()
    def _row(self, made: Callable[[], tuple[Case, _OpMeasure | _AttentionMeasure]], row: Row) -> Row:
        began = time.perf_counter()
        try:
            case, measure = made()
            verdict = measure.verdict(case)
            error = verdict.error if math.isfinite(verdict.error) else None  # JSON has no infinity; `problem` says it
            row = evolve(row, error=error, allowed=verdict.allowed, check_seconds=time.perf_counter() - began)
            row = self._timed(row, case, measure) if verdict.right else evolve(row, problem=f"wrong: {verdict}")
        except Exception as error:  # a plugin's kernel raises whatever it likes; the other rows still count
            row = evolve(row, problem=f"{type(error).__name__}: {error}"[:300])
        return evolve(row, wall_seconds=time.perf_counter() - began)

    def _timed(self, row: Row, case: Case, measure: _OpMeasure | _AttentionMeasure) -> Row:
        sets = argument_sets(case, self.device)
        taken = measure.seconds(sets)
        limit = case.limit(self.ceilings)
        computes = limit is not None and limit.computes
        name, best = measure.library_seconds(sets)
        return evolve(
            row,
            microseconds=taken * 1e6,
            rate=(case.flops if computes else case.nbytes) / taken / 1e12,
            unit="TFLOP/s" if computes else "TB/s",
            percent_of_roof=None if limit is None else 100 * limit.seconds / taken,
            limit_microseconds=None if limit is None else limit.seconds * 1e6,
            twin_microseconds=_micro(measure.twin_seconds(sets)),
            library_microseconds=_micro(best),
            library=name,
        )

    def _op_cases(self, op: str) -> list[Case]:
        return OpCases(table=SMALL if self.quick else FULL, draw=self._draw).of(op)

    def _twin_of(self, op: str) -> str:
        return next(e.spec.implementation for e in self.registry.ops if e.spec.op == op and e.provider.plugin == BUILTIN)

    def twin_backend(self) -> AttentionSpec:
        """Return the core's own attention backend, which defines what the others compute."""
        return next(each.spec for each in self.registry.attention_backends if each.provider.plugin == BUILTIN)

    @property
    def _draw(self) -> Draw:
        return Draw(device=self.device, dtype=torch_dtype(self.dtype))


@frozen(eq=False, kw_only=True)
class _OpMeasure:
    """How an implementation of an op is judged and timed."""

    bench: Bench
    op: str
    call: Callable[..., Any]
    twin: Callable[..., Any]
    library: library.Library | None

    def verdict(self, case: Case) -> Verdict:
        return op_verdict(self.op, self.call, self.twin, case.make)

    def seconds(self, sets: Sets) -> float:
        return seconds(self.call, sets, self.bench.device)

    def twin_seconds(self, sets: Sets) -> float | None:
        return _or_none("twin", partial(seconds, self.twin, sets, self.bench.device, rounds=FEW))

    def library_seconds(self, sets: Sets) -> tuple[str | None, float | None]:
        best = self.library
        if best is None:
            return None, None
        return best.name, _or_none(best.name, lambda: seconds(best.call, best.sets(sets), self.bench.device))


@frozen(eq=False, kw_only=True)
class _AttentionMeasure:
    """How a backend is judged and timed on one step. What `prepare` makes for a step is in no time: layers share it."""

    bench: Bench
    laid: Laid
    step: Step
    spec: AttentionSpec

    def verdict(self, case: Case) -> Verdict:
        return attention_verdict(self._attend(self.spec), self.laid)

    def seconds(self, sets: Sets) -> float:
        return seconds(self._attend(self.spec), sets, self.bench.device, captured=not self._is_twin)

    def twin_seconds(self, sets: Sets) -> float | None:
        twin = self.bench.twin_backend()
        if self.laid.inputs.page_size not in twin.page_sizes:
            return None
        return _or_none("twin", partial(seconds, self._attend(twin), sets, self.bench.device, captured=False, rounds=FEW))

    def library_seconds(self, sets: Sets) -> tuple[str | None, float | None]:
        calls = list(library.attention_calls(self.laid))
        if not calls:
            return None, None
        plain = library.side_by_side(self.laid, sets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says why a backend does not take the step
            timed = {each.name: _or_none(each.name, partial(seconds, each.call, plain, self.bench.device)) for each in calls}
        found = {name: taken for name, taken in timed.items() if taken is not None}
        best = min(found, key=lambda name: found[name], default=None)
        return (None, None) if best is None else (best, found[best])

    @property
    def _is_twin(self) -> bool:
        return self.spec == self.bench.twin_backend()

    def _attend(self, spec: AttentionSpec) -> Callable[..., Any]:
        backend = resolve(spec.factory)(self.step.needs(), self.bench.device)
        inputs = evolve(self.laid.inputs, prepared=backend.prepare(self.laid.inputs))
        return lambda q_THD, kv: backend.attend(q_THD, kv, inputs, self.laid.params)


def _made(case: Case, measure: _OpMeasure) -> tuple[Case, _OpMeasure]:
    return case, measure


def _or_none(name: str, timed: Callable[[], float]) -> float | None:
    """Return what a comparison takes; where it cannot run, None, and the log says why: that says nothing about the kernel."""
    try:
        return timed()
    except RuntimeError as error:
        log.get_logger().info("comparison_not_run", name=name, error=str(error).partition("\n")[0])
        return None


def _micro(taken: float | None) -> float | None:
    return None if taken is None else taken * 1e6


def _refuse_unknown(what: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise OptionError(f"no {what} is called {name!r}", fix=did_you_mean(name, known))


def _refuse_unfit(named: Iterable[tuple[str, Iterable[Obstacle]]]) -> None:
    for name, obstacles in named:
        raise OptionError(
            f"attention backend {name!r} does not serve here: {reasons(obstacles)}",
            fix=ways_around(obstacles) or f"leave out --backend {name}",
        )
