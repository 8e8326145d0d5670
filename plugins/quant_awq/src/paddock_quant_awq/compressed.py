"""compressed-tensors checkpoints with 4-bit integers, packed or not, inputs 16-bit or FP8 a token. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from paddock.errors import ModelConfigError
from paddock.module_lists import check_compressed, compressed_targets
from paddock.plugins import CheckpointFacts
from paddock_quant_awq.names import Untargeted
from paddock_quant_awq.reading import Entry, Section, saved_dtype, section_of
from paddock_quant_awq.scheme import PACKED, UNPACKED, Int4Scheme

METHOD = "compressed-tensors"
_MIXED = "mixed-precision"
_HEAD = "lm_head"
_HARMLESS = ("quant_method", "quantization_status", "global_compression_ratio", "version", "format", "provider")


@frozen(kw_only=True)
class Group:
    """What a group of linears has in common: how its integers are stored, and whether its inputs are rounded to FP8."""

    packing: str
    group_size: int
    symmetric: bool
    reorders: bool
    fp8_inputs: bool


def detect_w4a16(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of a 4-bit checkpoint whose activations stay as they are, else None."""
    scheme = _detect(facts)
    return None if scheme is None or scheme.fp8_inputs else scheme


def detect_w4a8(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of a 4-bit checkpoint whose activations are rounded to FP8, else None."""
    scheme = _detect(facts)
    return scheme if scheme is not None and scheme.fp8_inputs else None


def _detect(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of a checkpoint with 4-bit integers, else None; raise ModelConfigError where it is not readable."""
    section = _section(facts)
    if section is None:
        return None
    listed = section.entry.get("config_groups") or {}
    groups = list(listed.values()) if isinstance(listed, Mapping) else []
    if not any(_is_int4(group) for group in groups):
        return None
    section.reader.accept("config_groups", *_HARMLESS)
    group, targets = _common(section, groups)
    section.refuse_unless_empty("transform_config", "weights are rotated")
    _refuse_sparse(section)
    ignored = section.names("ignore")
    check_compressed(section.reader, "ignore", ignored)
    plain = Untargeted(targets, ignored)
    scheme = Int4Scheme(
        name=f"{METHOD}-{'w4a8' if group.fp8_inputs else 'w4a16'}",
        dtype=facts.dtype,
        packing=group.packing,
        group_size=group.group_size,
        scale_dtype=saved_dtype(facts),
        symmetric=group.symmetric,
        reorders=group.reorders,
        fp8_inputs=group.fp8_inputs,
        signed_scales=True,
        is_plain=plain,
        quantises_head=not plain(_HEAD, head=True),
        kv_cache_dtype=_kv(section),
    )
    section.reader.finish()
    return scheme


def _section(facts: CheckpointFacts) -> Section | None:
    entry = facts.config.get("quantization_config")
    if isinstance(entry, Mapping) and entry:
        return section_of(facts, entry) if entry.get("quant_method") == METHOD else None
    old = facts.config.get("compression_config")
    return section_of(facts, old, "compression_config") if isinstance(old, Mapping) and old else None


def _is_int4(group: object) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return isinstance(weights, Mapping) and weights.get("num_bits") == 4 and weights.get("type", "int") == "int"


def _common(section: Section, groups: list[Entry]) -> tuple[Group, tuple[str, ...]]:
    """Return what all groups have in common, and their targets; raise ModelConfigError where they differ."""
    found = []
    targets: list[str] = []
    for listed in groups:
        if not _is_int4(listed):
            weights = listed.get("weights") if isinstance(listed, Mapping) else listed
            raise section.reader.wrong("config_groups", weights, "4-bit integers in every group: formats are not mixed")
        found.append(_group(section, listed))
        targets += compressed_targets(section.reader, "config_groups.targets", listed.get("targets"))
    if len(set(found)) > 1:
        raise section.reader.wrong("config_groups", [str(each) for each in found], "groups that are all stored alike")
    return found[0], tuple(targets)


def _group(section: Section, listed: Entry) -> Group:
    weights = listed["weights"]
    symmetric, order = weights.get("symmetric", True), weights.get("actorder")
    if not isinstance(symmetric, bool):
        raise section.reader.wrong("weights.symmetric", symmetric, "true or false")
    if order not in (None, False, "weight", "static", "group", True):
        raise section.reader.wrong("weights.actorder", order, "null, 'weight', 'static' or 'group'")
    if listed.get("output_activations") is not None:
        raise section.reader.wrong("output_activations", listed["output_activations"], "null: outputs are never rounded")
    size = _group_size(section, weights)
    return Group(
        packing=_packing(section, listed),
        group_size=size,
        symmetric=symmetric,
        reorders=order in ("group", True) and size != -1,
        fp8_inputs=_fp8_inputs(section, listed.get("input_activations")),
    )


def _packing(section: Section, listed: Entry) -> str:
    found = listed.get("format") or section.entry.get("format") or PACKED
    if found not in (PACKED, UNPACKED):
        hint = " of a group, for format says mixed-precision" if found == _MIXED else ""
        raise ModelConfigError(
            f"config.json: quantization_config.format is {found!r}; 4-bit integers are read in {PACKED!r} and {UNPACKED!r}",
            fix=f"save the checkpoint again with format {PACKED}{hint}",
        )
    return str(found)


def _group_size(section: Section, weights: Entry) -> int:
    """Return the inputs that share a scale, -1 for all of an output; the strategy may be left to the group size."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel":
        return -1
    if strategy != "group":
        raise section.reader.wrong("weights.strategy", strategy, "'group' or 'channel' for 4-bit integers")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise section.reader.wrong("weights.group_size", size, "a positive whole number with strategy 'group'")
    return size


def _fp8_inputs(section: Section, inputs: object) -> bool:
    """Return whether inputs are rounded to FP8 with a scale a token; raise ModelConfigError for any other rounding."""
    if inputs is None:
        return False
    given = inputs if isinstance(inputs, Mapping) else {}
    if (given.get("num_bits"), given.get("type"), given.get("dynamic"), given.get("strategy")) != (8, "float", True, "token"):
        raise section.reader.wrong(
            "input_activations", inputs, "null, or 8-bit float with strategy 'token' and dynamic true, beside 4-bit weights"
        )
    return True


def _refuse_sparse(section: Section) -> None:
    section.reader.accept("sparsity_config")
    sparse = section.entry.get("sparsity_config") or {}
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") == "dense":
        return
    section.refuse_unless_empty("sparsity_config", "weights are sparse")


def _kv(section: Section) -> str | None:
    """Return the dtype there are KV scales for: FP8 with one static scale for each of K and V, or none."""
    section.reader.accept("kv_cache_scheme")
    scheme = section.entry.get("kv_cache_scheme")
    if scheme is None:
        return None
    given = scheme if isinstance(scheme, Mapping) else {}
    static = given.get("dynamic", False) is False and given.get("strategy") in (None, "tensor")
    symmetric = given.get("symmetric", True) is True
    if (given.get("num_bits"), given.get("type")) != (8, "float") or not static or not symmetric:
        raise section.reader.wrong("kv_cache_scheme", scheme, "null, or static symmetric 8-bit float with strategy 'tensor'")
    return "fp8"
