"""The gate: a quantised model's perplexity against its source's, on text that calibration never read.

What could only be found to be impossible at the end of the work is looked for before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from paddock import log
from paddock.checkpoint.source import CONFIG
from paddock.config import AUTO, EngineConfig, read_environment
from paddock.errors import OptionError, PaddockError, PlanError, QualityError, RequestError
from paddock.evaluation import perplexity
from paddock.llm import LLM
from paddock.planning import issues, kv_scales
from paddock.planning.hardware import Hardware
from paddock.planning.plan import Plan
from paddock.planning.quality_gate import WAY_OUT, measured_kv
from paddock.planning.resolve import resolve as planned
from paddock.plugins import CheckpointFacts, resolve
from paddock.plugins.registry import Registry
from paddock.quantize.source import PlainCheckpoint
from paddock.quantize.text import Text
from paddock.text.beginning import first_ids
from paddock.text.tokenizer import Tokenizer

_WINDOW = 2048
_ENGINE_OPTIONS = ("device", "strict", "revision", "tokenizer", "ignore_config_keys")
_LONGER = "give a longer one with --gate-text FILE"


def check_text(text: Text, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise OptionError for a text of which nothing can be predicted, or that begins with tokens the model does not know."""
    ids = first_ids(tokenizer.encode, text.words, _WINDOW)
    if len(ids) < 2:
        raise OptionError(
            f"the gate's text {text.name!r} has {len(ids)} token{'s' * (len(ids) != 1)} ({text.part}), too few to predict one "
            f"from another",
            fix=_LONGER,
        )
    if max(ids) >= vocab_size:
        raise OptionError(
            f"the tokenizer gives token {max(ids)} of the gate's text, and the model knows {vocab_size}",
            fix="use the model's own tokenizer",
        )


def require_measurable(
    files: Mapping[str, Mapping[str, Any]],
    plain: PlainCheckpoint,
    config: EngineConfig,
    registry: Registry,
    hardware: Hardware,
    *,
    kv_cache_dtype: str | None,
) -> None:
    """Raise PlanError where the quantised model that `files` will describe could not be run here, as `plan` would say of it.

    `kv_cache_dtype` is the one that scales are stored for, None where the recipe is asked for none.
    """
    others = {name: value for name, value in files.items() if name != CONFIG}
    facts = CheckpointFacts(config=files[CONFIG], dtype=plain.dtype, files=others, ignored_keys=config.ignore_config_keys)
    if all(resolve(each.spec.detect)(facts) is None for each in registry.quantizations):
        raise PlanError(
            "no installed plugin runs what the recipe writes, so no gate can measure it",
            fix="upgrade the plugin that brings the format, or leave the gate out",
        )
    made = evolve(plain.source, config=files[CONFIG], quantization_files=others, tensor_names=None)
    try:
        asked = EngineConfig.from_options(config.model, **_options(config, kv_cache_dtype) | {"revision": None})
        plan = planned(asked, registry, hardware, made, strict=read_environment().strict)
        issues.require_runnable(plan if kv_cache_dtype is None else _with_kv_scales(plan))
    except PaddockError as error:
        raise PlanError(
            f"the gate could not measure the quantised model: {error.message}",
            fix=f"{error.fix}, or leave the gate out" if error.fix else "leave the gate out",
        ) from error


def measure(
    folder: str,
    config: EngineConfig,
    text: str,
    *,
    plugins: tuple[object, ...],
    autoload: bool,
    kv_cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Return the perplexity of the model in a folder on a text, and what its keys and values were kept in.

    That is `kv_cache_dtype`, whatever the folder announces; None leaves it to the engine.
    Raises OptionError where the text is too short, QualityError where the model has none, and what loading it raises.
    """
    options = _options(config, kv_cache_dtype)
    if folder != config.model:
        options["revision"] = None
    with LLM(folder, plugins=plugins, autoload=autoload, progress=False, **options) as llm:
        try:
            kept_in = llm.plan.kv_cache_dtype
            found = perplexity(llm, text, window=min(_WINDOW, llm.max_model_len - 1))
        except RequestError as error:
            raise OptionError(f"the gate's text: {error.message}", fix=_LONGER) from error
        except PaddockError as error:
            raise QualityError(f"{folder} has no perplexity on the gate's text: {error.message}", fix=error.fix) from error
    if not math.isfinite(found.perplexity):
        raise QualityError(
            f"{folder} has no perplexity on the gate's text: {found.nats:.0f} nats a token are too many",
            fix="check that model and tokenizer belong together",
        )
    return {"tokens": found.tokens, "nats": found.nats, "perplexity": found.perplexity, "kv_cache_dtype": kept_in}


def measure_quantised(folder: str, config: EngineConfig, text: str, **how: Any) -> dict[str, Any]:
    """Return what `measure` does; NaN, with a warning that says why, for a model that has no perplexity."""
    try:
        return measure(folder, config, text, **how)
    except QualityError as error:
        log.get_logger().warning("perplexity_not_measured", model=folder, message=error.message, fix=error.fix)
        return {"tokens": 0, "nats": math.nan, "perplexity": math.nan}


def is_measured(gate: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Return whether a manifest's gate has the source's perplexity, measured on the text that is asked for."""
    before = gate.get("before", {}).get("perplexity", math.nan)
    return math.isfinite(before) and {key: gate.get(key) for key in asked} == asked


def growth(gate: Mapping[str, Any]) -> float:
    """Return by which share perplexity has grown."""
    return float(gate["after"]["perplexity"] / gate["before"]["perplexity"] - 1)


def require_passed(folder: Path, gate: Mapping[str, Any]) -> None:
    """Raise QualityError where perplexity has grown by more than the gate allows, or is no number."""
    grown = growth(gate)
    if not grown <= gate["limit"]:
        before, after = gate["before"]["perplexity"], gate["after"]["perplexity"]
        raise QualityError(
            f"perplexity has grown by {grown:.2%}, from {before:.3f} to {after:.3f}{measured_kv(gate)}; the gate allows "
            f"{gate['limit']:.2%}. The model stays in {folder}, marked failed",
            fix=WAY_OUT,
        )


def _options(config: EngineConfig, kv_cache_dtype: str | None) -> dict[str, Any]:
    """Return the options that a model is measured with."""
    taken = {name: getattr(config, name) for name in _ENGINE_OPTIONS}
    return taken | {"prefer": dict(config.prefer), "kv_cache_dtype": kv_cache_dtype or AUTO}


def _with_kv_scales(plan: Plan) -> Plan:
    """Return a plan that does not miss the KV scales which the recipe is going to store, announced or not."""
    return evolve(plan, issues=tuple(issue for issue in plan.issues if issue.code != kv_scales.SCALES_ARE_ONE))
