"""The dtypes of safetensors: how many bits an element takes, and what torch calls it. Free of torch."""

from __future__ import annotations

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
STORED_NAMES = {theirs: ours for ours, theirs in TORCH_NAMES.items()}

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def fills(stored: str, wanted: str) -> bool:
    """Return whether a stored dtype may fill a parameter of the torch dtype `wanted`: the same, or by conversion.

    Floats convert into any float, int32 into int64.

    An FP8 tensor means nothing without its scale and its own bit layout, so it fills that very dtype alone.
    """
    found = TORCH_NAMES.get(stored)
    return found == wanted or (found in FLOATS and wanted in FLOATS) or (found, wanted) == ("int32", "int64")
