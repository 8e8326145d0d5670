"""Which linears of a layer share an input, and what comes before them that can take the inverse of their scale. Free of torch."""

from __future__ import annotations

from collections import Counter

from attrs import frozen

from paddock.axes import Linear, Vector, WeightTable
from paddock.errors import PluginError


@frozen(kw_only=True)
class Rows:
    """The rows of a part of a linear, in pieces of `unit` rows, each of which feeds `copies` pieces of inputs in a row.

    Query heads that share values: a piece is a head of values, its copies are what the query heads of its group attend to.
    """

    linear: str
    part: str
    unit: int = 1
    copies: int = 1


@frozen(kw_only=True)
class ScaleGroup:
    """The names of linears with one input, and what is divided by their scale: a norm, or the rows of a part of a linear.

    `norm` is the norm's name; `follows` says which rows. Neither: nothing before them can be divided.
    """

    linears: tuple[str, ...]
    norm: str = ""
    follows: Rows | None = None


def scale_groups(table: WeightTable) -> tuple[ScaleGroup, ...]:
    """Return the groups of a layer in the order of its table. What a norm feeds is one group, whatever branches it leads into.

    Rows that several groups follow are divided for none. Raises PluginError for a table in which a linear follows what is no part
    of the layer, or of another size.
    """
    linears = [module for module in table.layer if isinstance(module, Linear)]
    norms = {module.name for module in table.layer if isinstance(module, Vector)}
    fed: dict[str, list[Linear]] = {}
    for linear in linears:
        fed.setdefault(linear.fed_by or linear.name, []).append(linear)
    followed = {feeder: _followed(members, linears) for feeder, members in fed.items()}
    shared = [rows for rows, count in Counter(followed.values()).items() if count > 1]
    return tuple(
        ScaleGroup(
            linears=tuple(linear.name for linear in members),
            norm=feeder if feeder in norms else "",
            follows=None if followed[feeder] in shared else followed[feeder],
        )
        for feeder, members in fed.items()
    )


def _followed(members: list[Linear], linears: list[Linear]) -> Rows | None:
    """Return the rows that all members follow, if any."""
    first = members[0]
    if not first.follows or any(linear.follows != first.follows for linear in members):
        return None
    for linear in linears:
        for part in linear.out:
            if part.name == first.follows and part.unit == first.inp.unit and first.in_size % part.size == 0:
                return Rows(linear=linear.name, part=part.name, unit=part.unit, copies=first.in_size // part.size)
    raise PluginError(
        f"linear {first.name!r} follows {first.follows!r}, and no part of its layer has that name and {first.in_size} rows "
        f"in pieces of {first.inp.unit}, or an even share of them",
        fix="let the model plugin name a part of the layer's linears, or none",
    )
