"""ModelOpt's INT4 AWQ checkpoints: signed 4-bit weights, two outputs to a byte. Free of torch.

Inputs are multiplied first where the exporter could not fold that into what comes before.
"""

from __future__ import annotations

from collections.abc import Mapping

from paddock.errors import ModelConfigError
from paddock.plugins import CheckpointFacts
from paddock_quant_awq.names import Wildcards
from paddock_quant_awq.reading import Entry, Section, section_of
from paddock_quant_awq.scheme import PAIRS, Int4Scheme

FILE = "hf_quant_config.json"
DEFAULT_GROUP_SIZE = 128  # config.json alone does not always say it
_ALGORITHMS = {"W4A16_AWQ": "modelopt-w4a16", "W4A8_AWQ": "modelopt-w4a8"}
_HEAD = "lm_head"
_HARMLESS = ("quant_method", "quant_algo", "producer", "config_groups", "kv_cache_scheme", "group_size", "quantization_status")


def detect_w4a16(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of a W4A16_AWQ checkpoint, else None."""
    return _detect(facts, "W4A16_AWQ")


def detect_w4a8(facts: CheckpointFacts) -> Int4Scheme | None:
    """Return the scheme of a W4A8_AWQ checkpoint, else None."""
    return _detect(facts, "W4A8_AWQ")


def _detect(facts: CheckpointFacts, algorithm: str) -> Int4Scheme | None:
    """Return the scheme of a checkpoint of this `quant_algo`, else None; raise ModelConfigError where files disagree."""
    sections = _sections(facts)
    said = {str(section.entry["quant_algo"]).upper() for section in sections if section.entry.get("quant_algo")}
    if algorithm not in said:
        return None
    if len(said) > 1:
        raise ModelConfigError(
            f"config.json and {FILE} name different algorithms: {', '.join(sorted(said))}",
            fix="take both files from the same export",
        )
    plain = Wildcards(_plain(sections))
    scheme = Int4Scheme(
        name=_ALGORITHMS[algorithm],
        dtype=facts.dtype,
        packing=PAIRS,
        group_size=_group_size(sections),
        scale_dtype="float32",
        symmetric=True,
        fp8_inputs=algorithm == "W4A8_AWQ",
        is_plain=plain,
        quantises_head=not plain(_HEAD, head=True),
        kv_cache_dtype=_kv(sections),
    )
    for section in sections:
        section.reader.only("has_zero_point", value=False)
        section.reader.accept("pre_quant_scale", *_HARMLESS)
        section.reader.finish()
    return scheme


def _sections(facts: CheckpointFacts) -> list[Section]:
    """Return what config.json and the file beside it say of a ModelOpt checkpoint, either of which may be missing."""
    found, entry = [], facts.config.get("quantization_config")
    if isinstance(entry, Mapping) and entry:
        if not str(entry.get("quant_method") or "").startswith("modelopt"):
            return []
        found.append(section_of(facts, entry))
    inner = facts.files.get(FILE, {}).get("quantization")
    if isinstance(inner, Mapping) and inner:
        found.append(section_of(facts, inner, "quantization", file=FILE))
    return found


def _plain(sections: list[Section]) -> tuple[str, ...]:
    """Return the patterns of modules left plain, the head where no list says otherwise."""
    keys = ("ignore", "exclude_modules")
    if not any(key in section.entry for section in sections for key in keys):
        return (_HEAD,)
    return tuple(dict.fromkeys(name for section in sections for name in section.names(*keys)))


def _group_size(sections: list[Section]) -> int:
    """Return the group size that any file says, 128 where none does; raise ModelConfigError where two differ."""
    sizes = {}
    for section in sections:
        for place in (section.entry, *_weights(section.entry)):
            size = place.get("group_size")
            if size is not None:
                if type(size) is not int or (size < 1 and size != -1):
                    raise section.reader.wrong("group_size", size, "-1 (one group) or positive")
                sizes[size] = section
    if len(sizes) > 1:
        (_, section), *_ = sizes.items()
        raise section.reader.wrong("group_size", sorted(sizes), "the same in every file")
    return next(iter(sizes), DEFAULT_GROUP_SIZE)


def _weights(entry: Entry) -> list[Entry]:
    groups = entry.get("config_groups")
    listed = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
    return [each for each in weights if isinstance(each, Mapping)]


def _kv(sections: list[Section]) -> str | None:
    """Return the dtype there are KV scales for: FP8 or none."""
    for section in sections:
        algorithm, scheme = section.entry.get("kv_cache_quant_algo"), section.entry.get("kv_cache_scheme")
        section.reader.accept("kv_cache_quant_algo")
        if algorithm not in (None, "FP8"):
            raise section.reader.wrong("kv_cache_quant_algo", algorithm, "FP8 or null")
        if scheme is not None and not _is_static_fp8(scheme):
            raise section.reader.wrong("kv_cache_scheme", scheme, "null, or static 8-bit float")
        if algorithm or scheme is not None:
            return "fp8"
    return None


def _is_static_fp8(scheme: object) -> bool:
    given = scheme if isinstance(scheme, Mapping) else {}
    return (given.get("num_bits"), given.get("type"), given.get("dynamic", False)) == (8, "float", False)
