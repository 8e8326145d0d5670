"""From a plain checkpoint to a quantised one: read a layer, calibrate, write it, let it go.

N sequences, L tokens a sequence, E model size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from attrs import evolve
from torch import Tensor

from paddock import log
from paddock.config import EngineConfig, read_environment
from paddock.errors import QualityError
from paddock.planning.hardware import GIB
from paddock.planning.quality_gate import FAILED
from paddock.progress import layer_progress
from paddock.quantize import gate
from paddock.quantize.folder import OutputFolder
from paddock.quantize.job import Job, decided
from paddock.quantize.manifest import COMPLETE, Manifest
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.recipe import LayerWork
from paddock.quantize.shards import ShardWriter
from paddock.quantize.source import as_stored


def quantize(
    config: EngineConfig,
    options: QuantizeOptions,
    *,
    plugins: Iterable[object] = (),
    autoload: bool = True,
    progress: bool | None = None,
) -> Manifest:
    """Make a quantised checkpoint of `config.model` in `options.out`; return its manifest.

    Of `config`, the model, its tokenizer, revision and ignored keys, the device, and what settles plugins are used. A run that
    was interrupted goes on where it was, and its result is the same byte for byte. `progress` None shows a bar on a terminal.
    Raises PaddockError: OptionError, PluginError and CheckpointError before anything is written, CheckpointError where writing
    fails, QualityError where the gate is not passed, or the plain model has no perplexity to hold it to: that before any layer.
    """
    log.configure_once(read_environment().log_level)
    job = decided(config, options, tuple(plugins), autoload=autoload)
    with OutputFolder.opened(options.out, job.made_from) as folder:
        _gate_before(job, folder)
        _write_layers(job, folder, progress)
        folder.finish(job.checkpoint.source.folder, job.files)
        _gate_after(job, folder)
        folder.close(COMPLETE)
    return folder.manifest


@torch.inference_mode()
def _write_layers(job: Job, folder: OutputFolder, progress: bool | None) -> None:
    """Write every layer that is not written, then what is outside the layers."""
    if folder.manifest.outside_done:
        return
    count, done = job.checkpoint.table.num_layers, folder.manifest.layers_done
    writer = ShardWriter(folder, job.options.max_shard_bytes)
    x_NLE = folder.activations()
    if job.ids_NL is not None and done == 0:
        x_NLE = job.stack.embed(job.ids_NL)
    with layer_progress(count, done=done, shown=progress) as advance:
        for index in range(done, count):
            started = time.monotonic()
            size = writer.add(_layer(job, index, x_NLE))
            if writer.is_full:
                writer.flush()
                folder.keep(index + 1, x_NLE if index + 1 < count else None)
            advance(size)
            seconds = round(time.monotonic() - started, 2)
            log.get_logger().info("layer_quantised", layer=index, seconds=seconds, gib=round(size / GIB, 3))
        writer.flush()
        writer.add(as_stored(job.checkpoint.outside_layers().values()))
        writer.flush()
        folder.keep(count, None, outside_done=True)


def _layer(job: Job, index: int, x_NLE: Tensor | None) -> dict[str, Tensor]:
    """Return every tensor to write of a layer, on the CPU; `x_NLE` becomes the residual stream behind it."""
    layer = job.stack.load(index)
    again = None if x_NLE is None else job.stack.again(layer, x_NLE)
    work: LayerWork = job.recipe.begin(evolve(layer.plain, run_with=again))
    if x_NLE is not None:
        job.stack.run(layer, x_NLE, work)
    made = work.tensors()
    prefix = job.checkpoint.layer_prefix(index)
    assert all(name.startswith(prefix) for name in made), f"a recipe made tensors outside {prefix}"
    kept = [tensor for name, tensor in job.checkpoint.of_layer(index).items() if name not in made]
    new = {name: each.detach().to("cpu", copy=True).contiguous() for name, each in made.items() if each is not None}
    return as_stored(kept) | new


def _gate_before(job: Job, folder: OutputFolder) -> None:
    """Measure the plain model, unless an interrupted run has; raise QualityError where it has no perplexity."""
    if job.gate_text is None:
        return
    text = job.gate_text.said()
    if gate.is_measured(folder.manifest.gate, text):
        before = folder.manifest.gate["before"]
    else:
        before = gate.measure(job.config.model, job.config, job.gate_text.words, plugins=job.plugins, autoload=job.autoload)
    folder.note_gate({"limit": job.options.gate, **text, "before": before})


def _gate_after(job: Job, folder: OutputFolder) -> None:
    """Measure the quantised model, with KV in what its scales are for; where it fails, mark the folder and raise QualityError."""
    if job.gate_text is None:
        return
    made = str(folder.path)
    after = gate.measure_quantised(
        made,
        job.config,
        job.gate_text.words,
        plugins=job.plugins,
        autoload=job.autoload,
        kv_cache_dtype=job.options.kv_cache_dtype,
    )
    found = folder.manifest.gate | {"after": after}
    folder.note_gate(found | {"growth": gate.growth(found)})
    try:
        gate.require_passed(folder.path, folder.manifest.gate)
    except QualityError:
        folder.close(FAILED)
        raise
