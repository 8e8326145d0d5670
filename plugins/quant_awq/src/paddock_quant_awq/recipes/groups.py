"""Which linears of a layer share an input, and what comes before them that can take the inverse of their scale. Free of torch."""

from __future__ import annotations

from attrs import frozen

from paddock.axes import Linear, Vector, WeightTable


@frozen(kw_only=True)
class ScaleGroup:
    """The names of linears with one input, and what is divided by their scale: a norm, or the rows of a part of a linear.

    `norm` is the norm's name; `follows` the names of the linear and its part. Both empty: nothing before them can be divided.
    """

    linears: tuple[str, ...]
    norm: str = ""
    follows: tuple[str, str] | None = None


def scale_groups(table: WeightTable) -> tuple[ScaleGroup, ...]:
    """Return the groups of a layer in the order of its table. What a norm feeds is one group, whatever branches it leads into."""
    linears = [module for module in table.layer if isinstance(module, Linear)]
    norms = {module.name for module in table.layer if isinstance(module, Vector)}
    holders = {part.name: linear.name for linear in linears for part in linear.out}
    fed: dict[str, list[Linear]] = {}
    for linear in linears:
        fed.setdefault(linear.fed_by or linear.name, []).append(linear)
    groups = []
    for feeder, members in fed.items():
        followed = {linear.follows for linear in members}
        part = followed.pop() if len(followed) == 1 else ""
        groups.append(
            ScaleGroup(
                linears=tuple(linear.name for linear in members),
                norm=feeder if feeder in norms else "",
                follows=(holders[part], part) if part else None,
            )
        )
    return tuple(groups)
