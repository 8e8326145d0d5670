"""Scales of FP8 keys and values: the names savers gave them, and which layers of a checkpoint have none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from paddock.axes import WeightTable
from paddock.config import DUMMY, EngineConfig
from paddock.planning.notes import Notes, listed
from paddock.planning.plan import ModelFiles

SCALES_ARE_ONE, SCALES_CONTRADICT = "kv_scales_are_one", "kv_scales_contradict"  # codes of issues

# Below the attention block: of ModelOpt; compressed-tensors and AutoFP8; vLLM; fused; one for both; early llm-compressor, Quark.
NAMES = {
    kind: (
        f"{kind}_proj.{kind}_scale",
        f"{kind}_scale",
        f"attn.{kind}_scale",
        f"qkv_proj.{kind}_scale",
        "kv_scale",
        f"{kind}_proj.output_scale",
    )
    for kind in ("k", "v")
}
ENDINGS = tuple(f".{name}" for names in NAMES.values() for name in names)
# Of queries in FP8, which are read where attention multiplies in FP8.
QUERIES = ("q_scale", "q_proj.q_scale", "attn.q_scale", "q_proj.output_scale")
# What some savers write beside them and may stay unread: zero points of symmetric scales, the scale of queries, where those are
# kept plain, and that of probabilities, which are at most 1.
UNREAD = (
    *(".k_zero_point", ".v_zero_point", ".kv_zero_point", ".output_zero_point", ".q_zero_point"),
    *(".q_scale", ".q_proj.output_scale", ".prob_output_scale", ".attn.prob_scale"),
)

_JOINT = ".kv_scale"  # for keys and values at once: no copy of either's own, beside which it stays unread
_ROUNDED = {"rel_tol": 0.01, "abs_tol": 2.0**-24}  # more than copies of a scale differ by in bfloat16, or in float16

_FIX = "use a checkpoint with calibrated KV scales, or keep KV in 16 bits with kv_cache_dtype"


def layers_without(names: Iterable[str], table: WeightTable) -> list[int]:
    """Return the layers for whose keys or values no tensor in `names` is a scale."""
    found: dict[str, set[str]] = {}
    for name in names:
        for kind, endings in NAMES.items():
            if name.endswith(tuple(f".{ending}" for ending in endings)):
                found.setdefault(kind, set()).add(name)
    return [i for i in range(table.num_layers) if not _has_both(found, table.layer_source.format(i=i))]


def _has_both(found: dict[str, set[str]], prefix: str) -> bool:
    return all(any(name.startswith(prefix) for name in found.get(kind, ())) for kind in NAMES)


def say_scales(
    config: EngineConfig, kv_dtype: str, calibrated: str | None, files: ModelFiles, table: WeightTable, notes: Notes
) -> None:
    """Say where KV is kept in FP8 with scales that cannot be meant.

    Those of 1 that nobody calibrated, for they are missing or all stored as 1, are a warning; copies of one scale that say
    different numbers are an error. `calibrated` is what config.json says the checkpoint has scales for.
    """
    if kv_dtype != "fp8" or config.load_format == DUMMY:
        return
    names = files.tensor_names
    if names is None:
        without = [] if calibrated == "fp8" else list(range(table.num_layers))
    else:
        without = layers_without(names, table)
    stored = files.read_scalars(name for name in names or () if name.endswith(ENDINGS))
    _say_contradictions(stored, notes)
    if not without:
        _say_ones(stored, notes)
        return
    layers = "every layer" if len(without) == table.num_layers else f"{len(without)} of {table.num_layers} layers"
    said = "the description of the checkpoint announces FP8 KV, but it" if calibrated == "fp8" else "the checkpoint"
    notes.find(
        "warning",
        SCALES_ARE_ONE,
        f"{said} holds no scales of FP8 keys and values for {layers}: they count as 1, which nobody calibrated",
        _FIX,
    )


def _say_ones(stored: Mapping[str, float], notes: Notes) -> None:
    """Warn where each stored scale is 1: tools that calibrate none write it."""
    if stored and all(scale == 1 for scale in stored.values()):
        said = f"all {len(stored)} scales of FP8 keys and values that the checkpoint holds are 1"
        notes.find("warning", SCALES_ARE_ONE, f"{said}: what tools write that calibrate none", _FIX)


def _say_contradictions(stored: Mapping[str, float], notes: Notes) -> None:
    """Refuse copies of one scale, under several of its names, that are not the same number but for rounding to 16 bits."""
    copies: dict[str, dict[str, float]] = {}
    for name, scale in stored.items():
        ending = max((each for each in ENDINGS if name.endswith(each)), key=len)
        if ending != _JOINT and math.isfinite(scale):
            kind = next(kind for kind, endings in NAMES.items() if ending.removeprefix(".") in endings)
            copies.setdefault(f"{name.removesuffix(ending)}.{kind}", {})[name] = scale
    wrong = [
        " and ".join(f"{name} is {scale:g}" for name, scale in sorted(each.items()))
        for each in copies.values()
        if not math.isclose(min(each.values()), max(each.values()), **_ROUNDED)
    ]
    if wrong:
        said = "copies of one scale of FP8 keys or values contradict each other:"
        notes.find("error", SCALES_CONTRADICT, listed(said, sorted(wrong)), _FIX)
