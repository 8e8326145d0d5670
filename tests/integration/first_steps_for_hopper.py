"""Take a small model's first steps with the kernels of a Hopper GPU, on a machine without one; print what compiled when.

Run as a script with a model folder, in a process of its own: nothing is launched and nothing computed, so values are anybody's.
With the word `fp8` the KV pages are FP8, with `attention` attention multiplies in FP8 too, with `fast` sums of FP8 products are
fast. Small steps of every size follow, and mixed ones, then draws from what filters leave of several numbers of rows, then draws
from logits made float32, as edits and penalties make them. The kernels of one more decode are printed too, and what of its layers
torch runs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from paddock.checkpoint.source import open_source
from paddock.config import EngineConfig
from paddock.execution import build
from paddock.execution.rehearsal import compile_ahead, compilers
from paddock.execution.runner import Runner, SmallSteps
from paddock.execution.sampling_ops import SAMPLING_OP_NAMES, SamplingOps
from paddock.execution.sampling_state import DRAWN, FILTERED
from paddock.execution.sizing import LargestStep, run_largest
from paddock.layers import finalise, packing, randomise
from paddock.planning import rebuild
from paddock.planning.hardware import GIB, Hardware
from paddock.planning.padding import CHUNK_TOKENS, StepShape, mixed_sizes
from paddock.planning.resolve import resolve
from paddock.plugins import resolve as imported
from paddock.plugins.host import PluginHost
from paddock.request import SamplingParams
from paddock.scheduling.step import Admission, PrefillChunk, Step
from paddock_triton import linear_ring

GPU = Hardware(
    device="cuda", name="H", memory_bytes=80 * GIB, available_bytes=80 * GIB, compute_capability=(9, 0), bandwidth=3.35e12
)
CPU, ON_GPU = torch.device("cpu"), torch.cuda.is_available()
FILTERED_ROWS = (2, 3, 33, 100, 256)  # whose filters split rows in other numbers of pieces than one row's


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
    """Return the list that the name of every kernel compiled goes to.

    Where there is no GPU the first kernel of a name stands for those of other sizes: what is asked is which are compiled when,
    and nothing is launched.
    """
    names: list[str] = []
    made: dict[str, Any] = {}
    compiling: defaultdict[str, Lock] = defaultdict(Lock)
    compile_kernel = triton.compiler.compile

    def watched(source: Any, **options: Any) -> Any:
        names.append(source.name)
        with compiling[source.name]:
            if ON_GPU or source.name not in made:
                made[source.name] = compile_kernel(source, **options)
            return made[source.name]

    triton.compiler.compile = watched
    return names


def _not_multiplied(x_TI: Tensor, weight_IO: Tensor, *_: Tensor, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    """Return the shape of an FP8 product: a CPU takes a minute for those of a wide model."""
    return x_TI.new_empty((x_TI.shape[0], weight_IO.shape[1]), dtype=out_dtype)


def _not_multiplied_plainly(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return the shape of a plain product, likewise."""
    return x_TI.new_empty((x_TI.shape[0], weight_OI.shape[0]))


def _first_request(runner: Runner, params: SamplingParams) -> None:
    """Launch a prompt of one token, then a decode."""
    step = Step(0)
    step.admissions.append(
        Admission(
            slot=0,
            sequence_id="s",
            params=params,
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


class _Torch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch runs, but for views and memory."""

    IDLE = ("empty", "view", "split", "flatten", "slice", "select.int")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        copied = "flatten" in func.__name__ and made.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr()
        if copied or not any(word in func.__name__ for word in self.IDLE):
            self.ran.append(func.__name__)
        return made


def _decode(runner: Runner, model: Any) -> dict[str, list[str]]:
    """Return the kernels one decode launches, and what torch runs in the model's layers."""
    launched: list[str] = []
    run, forward, torch_ran = JITFunction.run, model.forward, _Torch()

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **options)

    def watched(*args: Any) -> Any:
        with torch_ran:
            return forward(*args)

    JITFunction.run, model.forward = noted, watched
    runner.launch(Step(0, decode_slots=[0], decode_positions=[2]))
    return {"decode": launched, "torch": torch_ran.ran}


def _small_shapes(most: int) -> list[StepShape]:
    """Return all sizes of decodes alone and of a prompt alone, and some of both."""
    alone = [StepShape(decodes=n) for n in range(1, most + 1)]
    prompts = [StepShape(decodes=0, chunks=1, chunk_tokens=tokens) for tokens in CHUNK_TOKENS]
    return alone + prompts + [StepShape(decodes=n, chunks=4, chunk_tokens=160) for n in mixed_sizes(most)]


def _filter(runner: Runner, model: Any) -> None:
    """Draw from what filters leave: in padded decodes, and for rows picked out of a larger step, whose number is not padded."""
    assert runner._padded is not None
    for rows in FILTERED_ROWS:
        runner._padded.rehearse(StepShape(decodes=rows), FILTERED)
        _choose(runner, _logits(model, rows), FILTERED)


def _logits(model: Any, rows: int) -> torch.Tensor:
    """Return logits [R, V] in the model's dtype, of tokens 0."""
    logits_RV: torch.Tensor = model.logits(model.embed(torch.zeros(rows, dtype=torch.int64)))
    return logits_RV


def _choose(runner: Runner, logits_RV: torch.Tensor, kind: int) -> None:
    """Choose a token for each row of logits [R, V], as one of slot 0."""
    slot_R, index_R = torch.zeros(len(logits_RV), dtype=torch.int64), torch.zeros(len(logits_RV), dtype=torch.int32)
    runner._sampler.plain(logits_RV, slot_R, index_R, kind=kind)


def main() -> None:
    """Print which kernels were compiled ahead, by the largest step after that, by the first request, and by other steps."""
    driver.set_active(Hopper())
    torch._scaled_mm = _not_multiplied  # type: ignore[assignment]
    torch.nn.functional.linear = _not_multiplied_plainly  # type: ignore[assignment]
    packing.pack = lambda weight_OI: None  # as on a GPU
    linear_ring.runs_on = lambda device: True  # type: ignore[attr-defined]
    linear_ring.processors = lambda device: 132  # type: ignore[assignment, attr-defined]
    kv_dtype = "fp8" if "fp8" in sys.argv[2:] else "auto"
    compute = "fp8" if "attention" in sys.argv[2:] else "plain"
    config = EngineConfig(
        model=sys.argv[1],
        load_format="dummy",
        device="cuda",
        kv_cache_dtype=kv_dtype,
        attention_compute=compute,
        fp8_accumulation="fast" if "fast" in sys.argv[2:] else "exact",
    )
    plan = resolve(config, PluginHost().collect(), GPU, open_source(config.model, weights=False))
    names = _compiled()
    ahead = compilers(plan, CPU)
    backend = imported(plan.attention.factory)(rebuild.attention_needs(plan), CPU)
    model: Any = build.build_model(plan, backend, CPU)
    if plan.quantization is not None:  # what producers hand over is settled then
        randomise(model, torch.Generator().manual_seed(0))
        finalise(model)
    ops = SamplingOps.bind(build._implementations(plan, SAMPLING_OP_NAMES))
    found: dict[str, list[str]] = {}
    compile_ahead(ahead, plan, model, backend, ops, build._allocate(plan, 2, CPU), SmallSteps.CAPTURED)
    found["ahead"] = [*names]
    names.clear()
    run_largest(model, backend, build._allocate(plan, 1, CPU), ops, LargestStep.of(plan), CPU)
    found["largest"] = [*names]
    names.clear()
    kv, padded = build._allocate(plan, 8, CPU), SmallSteps.PADDED
    runner = Runner.of(plan, model, kv, backend, device=CPU, sampling_ops=ops, small_steps=padded)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=0.6, top_p=0.9), SamplingParams(temperature=0.0)):
        _first_request(runner, params)
    found["first request"] = [*names]
    names.clear()
    assert runner._padded is not None
    for shape in _small_shapes(plan.max_num_seqs):
        runner._padded.rehearse(shape, 0)
    found["other sizes"] = [*names]
    names.clear()
    _filter(runner, model)
    found["filters"] = [*names]
    names.clear()
    _choose(runner, _logits(model, 2).float(), DRAWN)
    found["float32"] = [*names]
    found |= _decode(runner, model)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
