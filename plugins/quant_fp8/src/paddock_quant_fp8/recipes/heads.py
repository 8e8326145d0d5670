"""Which linears are outside the layers, and which of a layer are its feed-forward. Free of torch."""

from __future__ import annotations

from paddock.axes import FFN, Linear, WeightTable


def head_names(table: WeightTable) -> tuple[str, ...]:
    """Return the checkpoint prefixes of the linears outside the layers, which every recipe leaves plain."""
    return tuple(part.source for module in table.outer if isinstance(module, Linear) for part in module.out)


def is_feed_forward(linear: Linear) -> bool:
    """Return whether a linear leads into the feed-forward width or out of it."""
    return linear.inp.axis == FFN or any(part.axis == FFN for part in linear.out)


def layer_linears(table: WeightTable) -> tuple[Linear, ...]:
    """Return the linears of a layer."""
    return tuple(module for module in table.layer if isinstance(module, Linear))
