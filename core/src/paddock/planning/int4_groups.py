"""Which 4-bit linears run in plain torch, because the kernels that were chosen are for groups of other sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attrs import define, field

from paddock.axes import Linear, RoundsInputs, Scheme, Shard, WeightTable
from paddock.planning.int4_compute import ALWAYS, Int4Compute
from paddock.planning.notes import Notes
from paddock.planning.weights import Tensors
from paddock.plugins.descriptors import OpSpec

_PRODUCTS = ("linear_int4", "linear_int4_fp8")


@define
class _Unserved:
    """The linears of a checkpoint that are in groups of one size, by prefix, and their inputs on a rank."""

    names: list[str] = field(factory=list)
    inputs: set[int] = field(factory=set)


def say_plain_torch(
    scheme: Scheme, table: WeightTable, tensors: Tensors, shard: Shard, ops: Collection[OpSpec], int4: Int4Compute, notes: Notes
) -> None:
    """Warn of 4-bit linears whose groups the chosen kernels do not serve: how many, the first, their groups, the way out.

    Kernels that declare no groups, plain torch among them, serve all.
    """
    if not isinstance(scheme, RoundsInputs):
        return
    chosen = [spec for spec in ops if spec.op in _used(int4) and spec.groups]
    found: dict[int, _Unserved] = {}
    for group, inputs, names in _grouped(table, tensors, shard):
        if not all(spec.serves_groups_of(group) for spec in chosen):
            unserved = found.setdefault(group, _Unserved())
            unserved.names += names
            unserved.inputs.add(inputs)
    if found:
        notes.find("warning", "int4_in_plain_torch", _message(found, chosen), _fix(found, chosen))


def _used(int4: Int4Compute) -> list[str]:
    """Return the ops that multiply by 4-bit weights, by the number of tokens from which inputs are in FP8."""
    plain, in_fp8 = _PRODUCTS
    return [in_fp8] if int4.inputs_from == ALWAYS else [plain] if int4.inputs_from is None else [plain, in_fp8]


def _grouped(table: WeightTable, tensors: Tensors, shard: Shard) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (inputs that share a scale on a rank, its inputs, checkpoint prefixes) of each linear that is not stored plainly."""
    for _, source, module in table.modules():
        if not isinstance(module, Linear) or module.tied_to:
            continue
        stored = tensors[source + module.out[0].source]
        if [tensor.name for tensor in stored] == ["weight"]:
            continue
        inputs = shard.part(module.inp).size
        axes = [axis for tensor in stored for axis in tensor.axes if axis.side == "in" and axis.group != 1]
        yield min((axis.piece(inputs) for axis in axes), default=1), inputs, [source + part.source for part in module.out]


def _message(found: dict[int, _Unserved], chosen: list[OpSpec]) -> str:
    count = sum(len(one.names) for one in found.values())
    groups = "; ".join(
        f"{len(one.names)} in groups of {group} inputs, the first {one.names[0]}" for group, one in sorted(found.items())
    )
    takes = "; ".join(f"{spec.op} takes groups of {_listed(spec.groups)}" for spec in chosen)
    return f"{count} 4-bit linears run in plain torch, slowly, because no kernel is for their groups: {groups} ({takes})"


def _listed(groups: Collection[int]) -> str:
    *others, largest = sorted(groups)
    return ", ".join([*map(str, others), f"multiples of {largest}"])


def _fix(found: dict[int, _Unserved], chosen: list[OpSpec]) -> str:
    sizes = {size for one in found.values() for size in one.inputs}
    served = set.intersection(*(set(spec.groups) for spec in chosen))
    able = [str(group) for group in sorted(served, reverse=True) if not any(size % group for size in sizes)]
    again = f"quantise the model again with --group-size {' or '.join(able)}" if able else "use an FP8 checkpoint of the model"
    enough = " and ".join(f"{spec.op}=paddock" for spec in chosen)
    return f"{again}, or set ops to {enough} to say that plain torch is enough"
