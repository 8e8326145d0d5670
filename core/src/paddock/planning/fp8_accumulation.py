"""How the sums of FP8 products are kept: in float32 each 128 inputs (exact), or as the matrix unit keeps them (fast)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from paddock.axes import Tensor
from paddock.config import EXACT_SUMS, FAST_SUMS
from paddock.errors import PlanError
from paddock.planning.notes import ASKED, Notes
from paddock.planning.plan import Rejected
from paddock.planning.weights import Tensors
from paddock.plugins.descriptors import OpSpec

NAME, EXACT_OP, FAST_OP = "fp8_accumulation", "linear_fp8", "linear_fp8_fast"
EXACT_GATED, FAST_GATED = "linear_silu_mul_fp8", "linear_silu_mul_fp8_fast"
FP8 = "float8_e4m3fn"
COST = "on an H200 a product of 4,096 tokens errs by 0.3 % of its root mean square instead of 0.2, in 6 % less time"


def choose_accumulation(
    asked: str,
    tensors: Tensors,
    ops: Sequence[OpSpec],
    *,
    owners: Mapping[str, str],
    rounds_weights: bool,
    scheme: str,
    notes: Notes,
) -> str:
    """Return how sums are kept, and write the choice down where there are FP8 products that can be summed either way.

    `rounds_weights`: 4-bit weights become FP8 in large steps. Products with scales of blocks are summed exactly. Where no plugin
    has quicker sums but one has the exact product, that one stays, with a warning. `owners` are the plugins that ops were asked
    of. Raises PlanError where fast sums are asked for and there is no product for them, or an exact one, plain or ending in an
    activation, is asked for by name and its fast one is not.
    """
    in_fp8 = [stored for stored in tensors.values() if any(tensor.dtype == FP8 for tensor in stored)]
    if not rounds_weights and all(map(_has_blocks, in_fp8)):
        if asked == FAST_SUMS:
            reason = "products with scales of blocks have exact sums alone" if in_fp8 else "no product is in FP8"
            raise PlanError(
                f"{NAME} is {asked!r}, but {reason} (quantization {scheme})",
                fix=f"leave {NAME} at {EXACT_SUMS}, or use a checkpoint in FP8 with scales of rows or of whole weights, or 4-bit "
                "weights with int4_compute w8a8",
            )
        return EXACT_SUMS
    if asked == EXACT_SUMS:
        rejected = Rejected(FAST_SUMS, f"not asked for; {COST}")
        notes.choose(NAME, EXACT_SUMS, "sums of FP8 products keep their bits unless speed is asked for", [rejected])
        return EXACT_SUMS
    _check_named(EXACT_OP, FAST_OP, owners)
    by_op = {spec.op: spec for spec in ops}
    if by_op[FAST_OP].rank < by_op[EXACT_OP].rank:
        notes.find(
            "warning",
            "fp8_sums_stay_exact",
            f"{NAME} is {asked!r}, but the plugin that multiplies FP8 ({by_op[EXACT_OP].implementation}) has exact sums alone",
            f"leave {NAME} at {EXACT_SUMS}, or use a plugin that implements {FAST_OP}",
        )
        notes.choose(NAME, EXACT_SUMS, f"no implementation of {FAST_OP} is as good as that of {EXACT_OP}")
        return EXACT_SUMS
    _check_named(EXACT_GATED, FAST_GATED, owners)
    notes.choose(NAME, FAST_SUMS, f"{ASKED}; {COST}")
    return FAST_SUMS


def _check_named(exact: str, fast: str, owners: Mapping[str, str]) -> None:
    """Raise PlanError where the exact product is asked for by name and fast sums would call another."""
    if exact in owners and fast not in owners:
        raise PlanError(
            f"{NAME} is {FAST_SUMS!r}, which calls {fast}, but ops asks for {exact} of {owners[exact]}",
            fix=f"leave {NAME} at {EXACT_SUMS}, leave {exact} out of ops, or say whose {fast} is meant: "
            f"ops {fast}={owners[exact]}",
        )


def _has_blocks(stored: Collection[Tensor]) -> bool:
    """Return whether a linear's scales are of blocks of its weight: several along its inputs."""
    return any(axis.side == "in" and axis.group > 1 for tensor in stored for axis in tensor.axes)
