"""Products that end in an activation: one op, or its parts one after the other where those are what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import evolve

from paddock.planning.notes import Notes
from paddock.planning.plan import Rejected
from paddock.plugins.descriptors import OpSpec
from paddock.plugins.discovery import BUILTIN
from paddock.plugins.provider import Provided
from paddock.plugins.registry import Registry

PARTS_OF_PRODUCTS: dict[str, tuple[str, str]] = {  # the plain product, then the activation
    "linear_silu_mul_fp8": ("linear_fp8", "silu_mul_fp8"),
    "linear_silu_mul_fp8_fast": ("linear_fp8_fast", "silu_mul_fp8"),
}


def with_chosen_parts(
    ops: Sequence[OpSpec], registry: Registry, *, owners: Mapping[str, str], notes: Notes
) -> tuple[OpSpec, ...]:
    """Return the ops, each product that ends in an activation left to its parts where one of them would not run as chosen.

    That is where a part was asked of another plugin (`owners`, by op), or a part's implementation is of higher rank; then the
    core's own is chosen, which runs the parts that are bound. A product that was itself asked for stays. The plan's choice says
    why.
    """
    by_op = {spec.op: spec for spec in ops}
    for name in [name for name in PARTS_OF_PRODUCTS if name in by_op]:
        every = [provided for provided in registry.ops if provided.spec.op == name]
        chosen = next(provided for provided in every if provided.spec == by_op[name])
        if chosen.provider.plugin == BUILTIN or name in owners:
            continue
        why = next(_why_not(chosen, by_op, owners), None)
        if why is not None:
            own = next(provided for provided in every if provided.provider.plugin == BUILTIN)
            by_op[name] = own.spec
            _say(chosen, own, why, notes)
    return tuple(by_op[spec.op] for spec in ops)


def _why_not(chosen: Provided[OpSpec], by_op: Mapping[str, OpSpec], owners: Mapping[str, str]) -> Iterator[str]:
    """Yield what speaks for the parts of a product."""
    for part in PARTS_OF_PRODUCTS[chosen.spec.op]:
        if part in owners and not chosen.provider.is_called(owners[part]):
            yield f"{part} is asked of {owners[part]}"
        if by_op[part].rank > chosen.spec.rank:
            yield f"rank {chosen.spec.rank}, below that of {part} ({by_op[part].rank})"


def _say(rejected: Provided[OpSpec], own: Provided[OpSpec], why: str, notes: Notes) -> None:
    """Write down, in place of the choice made before, that the parts run."""
    op, at = rejected.spec.op, [choice.name for choice in notes.choices].index(f"op {rejected.spec.op}")
    before = notes.choices[at]
    others = (Rejected(before.value, why), *(each for each in before.rejected if each.value != own.spec.implementation))
    parts = ", then ".join(PARTS_OF_PRODUCTS[op])
    notes.choices[at] = evolve(before, value=own.spec.implementation, reason=f"runs {parts}", rejected=others)
    notes.used[:] = [used for used in notes.used if (used.role, used.name) != ("op", op)]
    notes.use("op", op, own.provider)
