"""Take a small Llama's first steps with the kernels of a Hopper GPU, on a machine without one; print what compiled when.

Run as a script with a model folder, in a process of its own: nothing is launched and nothing computed, so values are anybody's.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from paddock.checkpoint.source import open_source
from paddock.config import EngineConfig
from paddock.execution import build
from paddock.execution.rehearsal import compile_ahead, compilers
from paddock.execution.runner import Runner, SmallSteps
from paddock.execution.sampling_ops import SAMPLING_OP_NAMES, SamplingOps
from paddock.execution.sizing import LargestStep, run_largest
from paddock.planning import rebuild
from paddock.planning.hardware import GIB, Hardware
from paddock.planning.resolve import resolve
from paddock.plugins import resolve as imported
from paddock.plugins.host import PluginHost
from paddock.request import SamplingParams
from paddock.scheduling.step import Admission, PrefillChunk, Step

GPU = Hardware(
    device="cuda", name="H", memory_bytes=80 * GIB, available_bytes=80 * GIB, compute_capability=(9, 0), bandwidth=3.35e12
)
CPU = torch.device("cpu")


class Hopper:
    """A driver that names the target and has no device."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda name, code, shared, device: (0, 0, 0, 0, 1024),
    )
    launcher_cls = staticmethod(lambda source, metadata: lambda *_: None)

    def get_current_target(self) -> GPUTarget:
        """Return compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the default stream."""
        return 0


def _compiled() -> list[str]:
    """Return the list that the name of every kernel compiled goes to."""
    names: list[str] = []
    compile_kernel = triton.compiler.compile

    def watched(source: Any, **options: Any) -> Any:
        names.append(source.name)
        return compile_kernel(source, **options)

    triton.compiler.compile = watched
    return names


def _first_request(runner: Runner) -> None:
    """Launch a prompt of one token, then a decode, greedily."""
    step = Step(0)
    step.admissions.append(
        Admission(
            slot=0,
            sequence_id="s",
            params=SamplingParams(temperature=0.0),
            token_ids=[0],
            prompt_len=1,
            stop_ids=frozenset(),
            bad_words_ids=(),
            seed=0,
        )
    )
    step.prefills.append(PrefillChunk(0, 0, [0], True))
    step.pages.append((0, 0, [0]))
    runner.launch(step)
    runner.launch(Step(0, decode_slots=[0], decode_positions=[1]))


def main() -> None:
    """Print which kernels were compiled ahead, by the largest step after that, and by the first request."""
    driver.set_active(Hopper())
    config = EngineConfig(model=sys.argv[1], load_format="dummy", device="cuda")
    plan = resolve(config, PluginHost().collect(), GPU, open_source(config.model, weights=False))
    names = _compiled()
    ahead = compilers(plan, CPU)
    backend = imported(plan.attention.factory)(rebuild.attention_needs(plan), CPU)
    model: Any = build.build_model(plan, backend, CPU)
    ops = SamplingOps.bind(build._implementations(plan, SAMPLING_OP_NAMES))
    found: dict[str, list[str]] = {}
    compile_ahead(ahead, plan, model, backend, ops, build._allocate(plan, 2, CPU), SmallSteps.CAPTURED)
    found["ahead"] = [*names]
    names.clear()
    run_largest(model, backend, build._allocate(plan, 1, CPU), ops, LargestStep.of(plan), CPU)
    found["largest"] = [*names]
    names.clear()
    runner = Runner(
        model,
        build._allocate(plan, 8, CPU),
        backend,
        num_slots=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        vocab_size=plan.vocab_size,
        device=CPU,
        seed=0,
        sampling_ops=ops,
        small_steps=SmallSteps.PADDED,
    )
    _first_request(runner)
    found["first request"] = [*names]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
