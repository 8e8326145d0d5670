"""What dtype the scales of quantised weights are kept in: the one they are stored in, so that loading rounds none of them."""

from __future__ import annotations

from collections.abc import Mapping

from paddock.axes import KeepsScales, Linear, Scheme, WeightTable
from paddock.planning.notes import Notes
from paddock.planning.plan import ModelFiles

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_WIDEST = "float32"  # holds any of 16 bits, and what is kept of float64


def choose_scale_dtype(scheme: Scheme, table: WeightTable, files: ModelFiles, notes: Notes) -> Scheme:
    """Return the scheme with its scales in the dtype that the weights' files hold them in, float32 where they hold several.

    Unchanged are schemes that leave no choice, and all where the files are not at hand: their usual dtype then counts.
    """
    if not isinstance(scheme, KeepsScales):
        return scheme
    stored = sorted(_stored(scheme, table, files.read_dtypes() or {}))
    if not stored:
        notes.choose("scale_dtype", scheme.scale_dtype, f"usual for {scheme.name}: no file of weights at hand says otherwise")
        return scheme
    chosen = stored[0] if len(stored) == 1 and stored[0] != "float64" else _WIDEST
    reason = "as the checkpoint stores them" if chosen == stored[0] else f"the checkpoint stores them in {', '.join(stored)}"
    notes.choose("scale_dtype", chosen, reason)
    return scheme.with_scale_dtype(chosen)


def scale_dtype_of(scheme: Scheme) -> str | None:
    """Return the dtype its scales are kept in, None where it leaves no choice."""
    return scheme.scale_dtype if isinstance(scheme, KeepsScales) else None


def _stored(scheme: KeepsScales, table: WeightTable, dtypes: Mapping[str, str]) -> set[str]:
    """Return the float dtypes of the stored scales of any linear; what is no float is for loading to refuse."""
    names = (
        f"{source}{part.source}.{scheme.scale_name}"
        for _, source, module in table.modules()
        if isinstance(module, Linear) and not module.tied_to
        for part in module.out
    )
    return {dtypes[name] for name in names if name in dtypes} & _FLOATS
