"""What a run is to do, decided and checked before anything is written.

N sequences, L tokens a sequence.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from paddock import log
from paddock.assemble import collect, detect_hardware
from paddock.checkpoint.source import open_source
from paddock.config import EngineConfig
from paddock.errors import OptionError
from paddock.planning.hardware import Hardware
from paddock.plugins import RecipeSpec, resolve
from paddock.plugins.descriptors import RECIPE_OPTIONS
from paddock.plugins.discovery import core_version
from paddock.plugins.provider import Provided
from paddock.plugins.registry import Registry
from paddock.quantize import gate
from paddock.quantize.options import DEFAULT_TEXT, QuantizeOptions
from paddock.quantize.recipe import Recipe, RecipeInputs
from paddock.quantize.source import PlainCheckpoint, open_plain
from paddock.quantize.stack import LayerStack
from paddock.quantize.text import Text, read_text, sequences
from paddock.text.files import NO_TOKENIZER
from paddock.text.tokenizer import read_tokenizer


@frozen(eq=False, kw_only=True)
class Job:
    """A run: `made_from` is what its result depends on, `ids_NL` the calibration sequences, None where nothing is run."""

    config: EngineConfig
    options: QuantizeOptions
    registry: Registry
    plugins: tuple[object, ...]
    autoload: bool
    checkpoint: PlainCheckpoint
    recipe: Recipe
    made_from: Mapping[str, Any]
    stack: LayerStack
    ids_NL: Tensor | None
    gate_text: Text | None
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)


def decided(config: EngineConfig, options: QuantizeOptions, plugins: tuple[object, ...], *, autoload: bool) -> Job:
    """Return the run; raise PaddockError for a model, a recipe, a text or an option with which there can be none."""
    registry = collect(config, plugins=plugins, autoload=autoload)
    provided = registry.recipe(options.recipe)
    _check_kv(provided.spec, options)
    asked = _asked(provided.spec, options)
    source = open_source(config.model, revision=config.revision)
    checkpoint = open_plain(source, config, registry)
    recipe: Recipe = resolve(provided.spec.create)(
        RecipeInputs(table=checkpoint.table, dtype=checkpoint.dtype, kv_cache_dtype=options.kv_cache_dtype, **asked)
    )
    _check_used(recipe, options)
    text = _text(recipe, options)
    ids_NL = None if text is None or not recipe.calibrated else _sequences(text, config, options, checkpoint)
    hardware = detect_hardware(config)
    length = 1 if ids_NL is None else ids_NL.shape[1]
    dtype = _computed(checkpoint.dtype, hardware)
    stack = LayerStack(checkpoint=checkpoint, device=torch.device(hardware.device), dtype=getattr(torch, dtype), length=length)
    files = recipe.files(source.config)
    gate_text = _gate_text(text, options)
    if gate_text is not None:
        gate.check_text(gate_text, read_tokenizer(_tokenizer_folder(config, checkpoint)), checkpoint.config.vocab_size)
        gate.require_measurable(files, checkpoint, config, registry, hardware, kv_cache_dtype=options.kv_cache_dtype)
    calibration = None
    if ids_NL is not None and text is not None:
        calibration = text.for_calibration.said() | {"samples": len(ids_NL), "sequence_length": length}
    _say_unread(text, options)
    return Job(
        config=config,
        options=options,
        registry=registry,
        plugins=plugins,
        autoload=autoload,
        checkpoint=checkpoint,
        recipe=recipe,
        made_from=_made_from(provided, options, checkpoint, calibration, f"{hardware.device} {dtype}"),
        stack=stack,
        ids_NL=ids_NL,
        gate_text=gate_text,
        files=files,
    )


def _made_from(
    provided: Provided[RecipeSpec],
    options: QuantizeOptions,
    checkpoint: PlainCheckpoint,
    calibration: dict[str, Any] | None,
    computed: str,
) -> dict[str, Any]:
    source, by = checkpoint.source, provided.provider
    return {
        "recipe": provided.spec.name,
        "kv_cache_dtype": options.kv_cache_dtype,
        "max_shard_bytes": options.max_shard_bytes,
        **_asked(provided.spec, options),
        "source": {
            "name": source.folder.resolve().name if source.revision is None else source.name,
            "revision": source.revision,
            "fingerprint": checkpoint.fingerprint(),
        },
        "calibration": calibration,
        "computed": computed,
        "versions": {
            "paddock": core_version(),
            by.distribution: by.version,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def _check_kv(spec: RecipeSpec, options: QuantizeOptions) -> None:
    wanted = options.kv_cache_dtype
    if wanted is not None and wanted not in spec.kv_cache_dtypes:
        able = ", ".join(sorted(spec.kv_cache_dtypes))
        fix = f"it stores them for {able}" if able else "leave --kv-cache out, or choose another recipe: paddock list recipes"
        raise OptionError(f"the recipe {spec.name!r} stores no scales for a KV cache in {wanted!r}", fix=fix)


def _asked(spec: RecipeSpec, options: QuantizeOptions) -> dict[str, Any]:
    """Return the options that are the recipe's to read; raise OptionError for one that is given and that it does not read."""
    given = {name: getattr(options, name) for name in RECIPE_OPTIONS}
    for name, value in given.items():
        if value is not None and name not in spec.options:
            able = ", ".join(sorted(spec.options))
            raise OptionError(
                f"{name} is {value!r}, which the recipe {spec.name!r} does not read",
                fix=f"leave {name} out" + (f"; it reads {able}" if able else ""),
            )
    return {name: value for name, value in given.items() if value is not None}


def _check_used(recipe: Recipe, options: QuantizeOptions) -> None:
    """Raise OptionError for numbers of calibration that nothing would read; a text may be given to every recipe."""
    given = {"samples": options.samples, "sequence_length": options.sequence_length}
    for name, value in given.items():
        if value is not None and not recipe.calibrated:
            raise OptionError(
                f"{name} is {value!r}, but nothing would read it: the recipe {options.recipe!r} is not calibrated",
                fix=f"leave {name} out",
            )


def _say_unread(text: Text | None, options: QuantizeOptions) -> None:
    """Warn of a calibration text that neither the recipe nor the gate reads."""
    if text is None and options.calibration is not None:
        log.get_logger().warning(
            "calibration_not_read",
            calibration=options.calibration,
            message=f"the recipe {options.recipe!r} needs no text, and no gate reads this one: the result is the same without it",
        )


def _text(recipe: Recipe, options: QuantizeOptions) -> Text | None:
    if recipe.calibrated or (options.gate is not None and options.gate_text is None):
        return read_text(options.calibration or DEFAULT_TEXT)
    return None


def _gate_text(text: Text | None, options: QuantizeOptions) -> Text | None:
    if options.gate is None:
        return None
    if options.gate_text is not None:
        return read_text(str(options.gate_text))
    assert text is not None
    return text.kept_apart


def _sequences(text: Text, config: EngineConfig, options: QuantizeOptions, checkpoint: PlainCheckpoint) -> Tensor:
    """Return the calibration sequences, all of which the model can take."""
    longest, known = checkpoint.config.max_model_len, checkpoint.config.vocab_size
    ids_NL = sequences(text.for_calibration, read_tokenizer(_tokenizer_folder(config, checkpoint)), options, longest=longest)
    if ids_NL.shape[1] > longest:
        raise OptionError(
            f"sequence_length is {ids_NL.shape[1]}, and the model takes at most {longest} tokens", fix="lower sequence_length"
        )
    if int(ids_NL.max()) >= known:
        raise OptionError(
            f"the tokenizer gives token {int(ids_NL.max())}, and the model knows {known}", fix="use the model's own tokenizer"
        )
    return ids_NL


def _tokenizer_folder(config: EngineConfig, checkpoint: PlainCheckpoint) -> Path:
    if config.tokenizer == NO_TOKENIZER:
        raise OptionError(
            f"tokenizer is {NO_TOKENIZER!r}, and there is a text to read", fix="name the folder of a tokenizer, or leave it out"
        )
    return Path(config.tokenizer) if config.tokenizer else checkpoint.source.folder


def _computed(saved: str, hardware: Hardware) -> str:
    """Return the dtype layers are run in: the checkpoint's, or where a CPU is slow in that, float32, which holds it exactly."""
    quick = saved == "bfloat16" and hardware.bf16_instructions
    return saved if hardware.device == "cuda" or quick else "float32"
