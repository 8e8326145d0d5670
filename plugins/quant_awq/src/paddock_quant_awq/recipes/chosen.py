"""What a run of the recipe makes: layout, scheme and group size, settled from what was asked and what the model allows.

Free of torch.
"""

from __future__ import annotations

from attrs import evolve, frozen

from paddock.axes import FFN, HEADS, KV_HEADS, Linear, Shard, WeightTable
from paddock.errors import OptionError, PlanError, did_you_mean
from paddock.quantize.recipe import RecipeInputs

AUTOAWQ, COMPRESSED, MODELOPT = "autoawq", "compressed-tensors", "modelopt"
FORMATS = (COMPRESSED, AUTOAWQ, MODELOPT)
W4A16, W4A8 = "w4a16", "w4a8"
SCHEMES = (W4A16, W4A8)
GROUP_SIZES = (128, 64, 32)  # common among 4-bit kernels; not every one takes 32
_CUTS = frozenset({HEADS, KV_HEADS, FFN})


@frozen(kw_only=True)
class Chosen:
    """One of `FORMATS`, one of `SCHEMES`, one of `GROUP_SIZES`, and whether groups have zero points."""

    format: str
    scheme: str
    group_size: int
    zero_points: bool


def chosen(inputs: RecipeInputs) -> Chosen:
    """Return what to make: w4a16 in compressed-tensors' layout with groups of 128, unless something else was asked for.

    It has zero points where the layout can have them, unless they are declined, as the preset W4AFP8 of compressed-tensors does.
    Raises OptionError for an unknown name, for FP8 activations in AutoAWQ's layout, which has no word for them, for zero points
    where a layout always or never has them, for groups that do not divide the inputs of linears, or a rank's share of them, all
    of which it names, and then for outputs that a layout cannot store together.
    """
    layout, scheme = _one_of("format", inputs.format, FORMATS), _one_of("scheme", inputs.scheme, SCHEMES)
    if (layout, scheme) == (AUTOAWQ, W4A8):
        raise OptionError(
            f"scheme is {W4A8!r}, and AutoAWQ's layout has no word for activations in FP8",
            fix=f"use --format {COMPRESSED} or --format {MODELOPT}, or --scheme {W4A16}",
        )
    shares = _shares(inputs.table, inputs.tp_compatible or 1)
    zero_points = _zero_points(layout, inputs.zero_points)
    group_size = _group_size(shares, inputs)
    _check_outputs(shares, layout, zero_points, inputs.tp_compatible)
    return Chosen(format=layout, scheme=scheme, group_size=group_size, zero_points=zero_points)


def _zero_points(layout: str, given: bool | None) -> bool:
    if layout == COMPRESSED:
        return given is not False
    able = layout == AUTOAWQ
    if given not in (None, able):
        name = {AUTOAWQ: "AutoAWQ", MODELOPT: "ModelOpt"}[layout]
        option = "--zero-points" if given else "--no-zero-points"
        raise OptionError(
            f"zero_points is {given}, and {name}'s layout {'always' if able else 'never'} has them",
            fix=f"leave {option} out, or use --format {COMPRESSED}",
        )
    return able


def _one_of(name: str, given: str | None, known: tuple[str, ...]) -> str:
    if given is not None and given not in known:
        raise OptionError(f"{name} is {given!r}", fix=did_you_mean(given, known))
    return known[0] if given is None else given


def _shares(table: WeightTable, ranks: int) -> tuple[Linear, ...]:
    """Return what a rank holds of each linear of a layer, named by checkpoint; raise OptionError where ranks cannot share one."""
    shard = Shard(0, ranks, _CUTS)
    try:
        return tuple(
            evolve(shard.linear(linear), name=linear.out[0].source) for linear in table.layer if isinstance(linear, Linear)
        )
    except PlanError as error:
        raise OptionError(f"tp_compatible is {ranks}: {error.message}", fix=error.fix) from error


def _check_outputs(shares: tuple[Linear, ...], layout: str, zero_points: bool, ranks: int | None) -> None:
    together = 2 if layout == MODELOPT else 8 if zero_points else 1  # outputs in a byte or a word, of weights or of zero points
    for linear in shares:
        for part in linear.out:
            if part.size % together:
                where = f" on each of {ranks} ranks" if ranks else ""
                with_zeros = " with zero points" if zero_points else ""
                raise OptionError(
                    f"format is {layout!r}, which{with_zeros} stores {together} outputs together; "
                    f"{part.source} has {part.size}{where}",
                    fix=f"use --format {COMPRESSED} --no-zero-points" + (", or fewer ranks" if ranks else ""),
                )


def _group_size(shares: tuple[Linear, ...], inputs: RecipeInputs) -> int:
    able = _able(shares)
    given, ranks = inputs.group_size, inputs.tp_compatible
    if given is not None and given not in GROUP_SIZES:
        raise OptionError(f"group_size is {given}", fix=f"use {_listed(GROUP_SIZES)}, sizes that 4-bit kernels commonly take")
    where = f" on each of {ranks} ranks" if ranks else ""
    if not able:
        stuck = _undivided(shares, GROUP_SIZES[-1])
        inputs_of = ", nor ".join(f"the {size} inputs of {', '.join(names)}" for size, names in stuck.items())
        raise OptionError(f"no group size of {_listed(GROUP_SIZES)} divides {inputs_of}{where}", fix=_other_ways(inputs))
    if given is None and ranks is not None:
        return able[0]
    size = GROUP_SIZES[0] if given is None else given
    if size not in able:
        have = (
            f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} {width} inputs{where}: {width / size:g} groups"
            for width, names in _undivided(shares, size).items()
        )
        raise OptionError(f"group_size is {size}, and {'; '.join(have)}", fix=f"use --group-size {_listed(tuple(able))}")
    return size


def _undivided(shares: tuple[Linear, ...], size: int) -> dict[int, list[str]]:
    """Return the linears of the checkpoint whose inputs groups of `size` do not divide, by how many inputs they have."""
    found: dict[int, list[str]] = {}
    for linear in (linear for linear in shares if linear.in_size % size):
        found.setdefault(linear.in_size, []).extend(part.source for part in linear.out)
    return found


def _able(shares: tuple[Linear, ...]) -> list[int]:
    """Return the group sizes that divide all inputs."""
    return [size for size in GROUP_SIZES if all(linear.in_size % size == 0 for linear in shares)]


def _other_ways(inputs: RecipeInputs) -> str:
    """Return what works where no group size does: fewer ranks, or no groups."""
    for ranks in range((inputs.tp_compatible or 1) - 1, 0, -1):
        try:
            if _able(_shares(inputs.table, ranks)):
                return f"use --tp-compatible {ranks}"
        except OptionError:  # so many cannot share the heads
            continue
    return "use an FP8 recipe, which has no groups: paddock list recipes"


def _listed(sizes: tuple[int, ...]) -> str:
    *most, last = map(str, sizes)
    return f"{', '.join(most)} or {last}" if most else last
