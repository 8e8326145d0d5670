"""How the model is stored and computed: its family, the dtype of activations, the quantisation of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from paddock.axes import Scheme, Unquantized
from paddock.config import AUTO, EngineConfig
from paddock.errors import ModelConfigError, PaddockError, PlanError, PluginError
from paddock.planning.hardware import Hardware
from paddock.planning.notes import ASKED, Candidate, Notes, Obstacle, reasons, ways_around, why_not_here
from paddock.planning.plan import ModelFiles, Rejected
from paddock.plugins import kinds
from paddock.plugins.descriptors import CheckpointFacts, ModelSpec, QuantizationSpec, resolve
from paddock.plugins.provider import Provided
from paddock.plugins.registry import Registry

NONE = "none"
_UNNAMED = "unnamed"
_ENTRIES = ("quantization_config", "compression_config")
_TELLING = ("quant_algo", "format", "bits")
_OTHER_FILES = {"hf_quant_config.json": "modelopt", "quant_config.json": "awq", "quantize_config.json": "gptq"}


@frozen(kw_only=True)
class Format:
    """The dtype of activations and plain linears, and how the others are kept: as stored, or quantised while read (`online`)."""

    dtype: str
    quantization: QuantizationSpec | None
    scheme: Scheme
    online: bool = False
    could_be: tuple[str, ...] = ()  # formats a plain checkpoint can be quantised to while it is read


def choose_model(config: EngineConfig, registry: Registry, files: ModelFiles, notes: Notes) -> tuple[ModelSpec, Any]:
    """Return the model family of config.json's architecture, and its parsed config."""
    names = files.config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelConfigError(
            f"config.json has no architectures (found {names!r:.80})",
            fix='add "architectures": [...], as `transformers` writes it, or point at a folder with a language model',
        )
    known = {name for provided in registry.models for name in provided.spec.architectures}
    name = next((name for name in names if name in known), names[0])
    provided = registry.model_for(name)
    notes.choose("model", provided.spec.name, f"{provided.provider.distribution} brings {name}")
    notes.use("model", provided.spec.name, provided.provider)
    return provided.spec, resolve(provided.spec.parse_config)(files.config, config.ignore_config_keys)


def choose_format(
    config: EngineConfig, registry: Registry, hardware: Hardware, files: ModelFiles, saved: str, notes: Notes
) -> Format:
    """Return dtype and quantisation: the best ranked dtype that hardware and quantisation both take.

    `saved` is the dtype of the checkpoint. Raises PlanError or PluginError when nothing installed reads it as asked.
    """
    rejected: list[Rejected] = []
    around: list[str] = []
    candidates = dtype_candidates(config.dtype, saved, hardware)
    for position, candidate in enumerate(candidates):
        found = _detect(config, registry, files, candidate.value)
        obstacles = _dtype_unfit(candidate.value, hardware)
        obstacles += _quantization_unfit(found.provided.spec, hardware, candidate.value) if found else []
        if not obstacles:
            lower = [Rejected(other.value, "ranked lower") for other in candidates[position + 1 :]]
            notes.choose("dtype", candidate.value, candidate.reason, [*rejected, *lower])
            return _noted(candidate.value, found, _online_formats(registry), notes)
        rejected.append(Rejected(candidate.value, reasons(obstacles)))
        around.append(ways_around(obstacles))
    tried = "; ".join(f"{one.value}: {one.reason}" for one in rejected)
    said = ", or ".join(dict.fromkeys(filter(None, around)))
    raise PlanError(f"no dtype works on {hardware.name}: {tried}", fix=said or "choose another dtype, device or checkpoint")


def dtype_candidates(asked: str, saved: str, hardware: Hardware) -> list[Candidate]:
    """Return the dtypes to try, best first: what was asked for; on a GPU the checkpoint's; on a CPU the quickest.

    A CPU that multiplies bfloat16 itself does so 2 to 3 times as fast as float32 at 16 or more tokens; one that does not
    converts every element and is slower than float32. Measurements: docs/decisions/0041-dtype-on-a-cpu.md.
    """
    if asked != AUTO:
        return [Candidate(asked, ASKED)]
    if hardware.device == "cuda":
        first = Candidate(saved, "the dtype the checkpoint was saved in")
        return [first, *(Candidate(other, "16 bits, as saved") for other in ("bfloat16", "float16") if other != saved)]
    quick = Candidate("bfloat16", "the CPU multiplies bfloat16 itself: quicker than float32")
    plain = Candidate("float32", "the CPU has no instructions for bfloat16: float32 is quicker")
    if hardware.bf16_instructions:
        return [quick, Candidate("float32", "every CPU computes in float32")]
    return [plain, Candidate("bfloat16", "half the memory of float32")]


def _dtype_unfit(dtype: str, hardware: Hardware) -> list[Obstacle]:
    capability = hardware.compute_capability
    if dtype == "bfloat16" and capability is not None and capability < (8, 0):
        return [Obstacle(f"{hardware.name} has no bfloat16 (compute capability {capability[0]}.{capability[1]}, needs 8.0)")]
    return []


def _quantization_unfit(spec: QuantizationSpec, hardware: Hardware, dtype: str) -> list[Obstacle]:
    return [Obstacle(f"{spec.name} {why.reason}", why.fix) for why in why_not_here(spec, hardware, dtype)]


@frozen(kw_only=True)
class Found:
    """The quantisation to use and its scheme; `online` when the checkpoint is plain and quantised while it is read."""

    provided: Provided[QuantizationSpec]
    scheme: Scheme
    online: bool = False


def _noted(dtype: str, found: Found | None, could_be: tuple[str, ...], notes: Notes) -> Format:
    if found is None:
        notes.choose("quantization", NONE, "config.json names no quantisation")
        return Format(dtype=dtype, quantization=None, scheme=Unquantized(dtype), could_be=could_be)
    spec, provider = found.provided.spec, found.provided.provider
    reason = f"{provider.distribution} recognises the checkpoint"
    if found.online:
        reason = f"{ASKED}: the checkpoint is plain, {provider.distribution} quantises it while it is read"
    notes.choose("quantization", spec.name, reason)
    notes.use("quantization", spec.name, provider)
    return Format(dtype=dtype, quantization=spec, scheme=found.scheme, online=found.online)


def _detect(config: EngineConfig, registry: Registry, files: ModelFiles, dtype: str) -> Found | None:
    """Return the one installed format that recognises the checkpoint, None for a plain one."""
    if not all(isinstance(files.config.get(key) or {}, Mapping) for key in _ENTRIES):
        raise _unnamed(files)
    facts = CheckpointFacts(
        config=files.config, dtype=dtype, files=files.quantization_files, ignored_keys=config.ignore_config_keys
    )
    declared = declared_method(files)
    schemes = ((provided, resolve(provided.spec.detect)(facts)) for provided in _formats_to_ask(config, registry))
    matches = [Found(provided=provided, scheme=scheme) for provided, scheme in schemes if scheme is not None]
    if len(matches) > 1:
        owners = " and ".join(f"{one.provided.spec.name!r} of {one.provided.provider}" for one in matches)
        raise PluginError(
            f"the checkpoint is recognised by {owners}", fix=f"choose one, as in quantization={matches[0].provided.spec.name!r}"
        )
    if config.quantization == NONE and (declared or matches):
        raise PlanError(
            f"quantization is 'none', but the checkpoint is quantised ({declared or matches[0].provided.spec.name})",
            fix="leave quantization at auto, or use the unquantised checkpoint",
        )
    if matches:
        return matches[0]
    if declared:
        raise _unread(config, registry, files, declared)
    return None if config.quantization in (AUTO, NONE) else _online(registry, config.quantization, facts)


def _formats_to_ask(config: EngineConfig, registry: Registry) -> tuple[Provided[QuantizationSpec], ...]:
    if config.quantization in (AUTO, NONE):
        return registry.quantizations
    return (registry.quantization(config.quantization),)


def _unread(config: EngineConfig, registry: Registry, files: ModelFiles, declared: str) -> PaddockError:
    """Return the error for a checkpoint that is quantised, but not in a format that may read it."""
    if declared == _UNNAMED:
        return _unnamed(files)
    said = f"{declared!r}{_details(files)}"
    if config.quantization not in (AUTO, NONE) and config.quantization != declared:
        return PlanError(
            f"quantization is {config.quantization!r}, but the checkpoint is quantised as {said}",
            fix="leave quantization at auto, which reads it as it is, or use the unquantised checkpoint",
        )
    brought = {provided.spec.name: provided.spec for provided in registry.quantizations}
    if declared in brought:
        of_it = [spec.summary for name, spec in sorted(brought.items()) if name.startswith(declared) and spec.summary]
        read = f"of {declared}, this is read: {'; '.join(of_it)}; " if of_it else ""
        return PlanError(
            f"the checkpoint is quantised as {said}, but no installed quantisation recognises it",
            fix=f"{read}use a checkpoint in a format that `paddock list quantizations` shows: {', '.join(sorted(brought))}",
        )
    missing = registry.missing(kinds.QUANTIZATIONS, declared)
    return PluginError(f"{missing.message}\n  the checkpoint is quantised as {said}", fix=missing.fix)


def _unnamed(files: ModelFiles) -> ModelConfigError:
    said = [key for key in _ENTRIES if files.config.get(key)]
    key = next((key for key in said if not isinstance(files.config[key], Mapping)), said[0])
    return ModelConfigError(
        f"config.json: {key} is {files.config[key]!r:.120}, which names no quant_method",
        fix=f"{key} must be an object: add {key}.quant_method, as the tool that made the weights calls it, or remove {key}"
        " where they are plain",
    )


def _online(registry: Registry, name: str, facts: CheckpointFacts) -> Found:
    """Return how a plain checkpoint is quantised while it is read; raise PlanError where the format cannot."""
    provided = registry.quantization(name)
    if provided.spec.online is None:
        able = _online_formats(registry)
        instead = f"; a plain one can be quantised while it is read as {', '.join(able)}" if able else ""
        raise PlanError(
            f"quantization is {name!r}, but the checkpoint is not quantised",
            fix=f"use a checkpoint quantised as {name}, or leave quantization at auto{instead}",
        )
    return Found(provided=provided, scheme=resolve(provided.spec.online)(facts), online=True)


def _online_formats(registry: Registry) -> tuple[str, ...]:
    return tuple(sorted(each.spec.name for each in registry.quantizations if each.spec.online is not None))


def _details(files: ModelFiles) -> str:
    """Return what the files say beside the method's name, as far as it tells formats of one tool apart."""
    sections = [files.config.get(key) for key in _ENTRIES]
    sections.append(files.quantization_files.get("hf_quant_config.json", {}).get("quantization"))
    described = [each for each in sections if isinstance(each, Mapping)]
    told = {key: each[key] for each in described for key in _TELLING if each.get(key) or (key == "quant_algo" and key in each)}
    return f" ({', '.join(f'{key} {value!r:.60}' for key, value in told.items())})" if told else ""


def declared_method(files: ModelFiles) -> str:
    """Return the quantisation the model's files name, an empty text for a plain checkpoint."""
    for key in _ENTRIES:
        entry = files.config.get(key)
        if not entry:
            continue
        given = entry if isinstance(entry, Mapping) else {}
        if given.get("load_in_4bit") or given.get("load_in_8bit"):  # bitsandbytes, before transformers named methods
            return str(given.get("quant_method") or "bitsandbytes")
        by_key = "compressed-tensors" if given and key == "compression_config" else _UNNAMED
        return str(given.get("quant_method") or by_key)
    return next((method for name, method in _OTHER_FILES.items() if name in files.quantization_files), "")
