"""Compile products for compute capability 9.0 on a machine that may have no GPU; print what the assembler says of each as JSON.

Run as a module, in a process of its own, from the repository's root: python -m plugins.triton.tests.products_for_hopper WORD.
`int4` is the product with INT4 weights, for tiles with least to spare, `every int4` for each that the op takes; `gated` a product
with FP8 weights that ends in an activation, beside the plain one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import evolve
from plugins.triton.tests.compile_for_hopper import FP8, HALF, TOKENS, pretend, resources
from triton.runtime.jit import JITFunction

from paddock.layers.int4 import int4_weight
from paddock_triton import ops_linear_int4
from paddock_triton.int4_spec import Int4Tile
from paddock_triton.ops_linear_fp8 import linear_fp8
from paddock_triton.ops_linear_fp8_gated import linear_silu_mul_fp8

# Gate and up of Llama-3.1-70B, and a weight of which no tile is whole.
GATED: tuple[tuple[int, int], ...] = ((57344, 8192), (144, 1008))


def _compile_only() -> list[Any]:
    """Make every launch compile and stop there; return the list that each compiled kernel goes to."""
    made, run = list[Any](), JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, warmup=True, **options))
        return made[-1]

    JITFunction.run = compiled
    return made


def _int4_cuts(*, every: bool) -> list[tuple[Int4Tile, torch.dtype, int, torch.dtype]]:
    """Return the tiles that a product with INT4 weights takes, or those with least to spare: inputs, group, the scales' dtype.

    Scales in float32 take most memory, in the smallest groups: tiles with little to spare are compiled with them too. float16 is
    multiplied by the instructions of bfloat16, but for those that make its numbers.
    """
    op, wide = ops_linear_int4, torch.float32
    least = [
        *((tile, FP8, 128, HALF) for tile in (op._FP8[64], op._FP8[128], op._FP8_WAVES, op._FP8_DEEP[16])),
        *((tile, FP8, 128, wide) for tile in (op._FP8_MANY, op._FP8_DEEP[64])),
        (op._FP8_OTHER_GROUPS, FP8, 32, wide),
        *((tile, HALF, 128, HALF) for tile in (op._HALVES[8], op._HALVES_WAVES)),
        (evolve(op._HALVES[128], deep=False), HALF, 32, wide),
        (op._HALVES[8], torch.float16, 128, HALF),
    ]
    shared = [evolve(op._FP8_DEEP[most], shared=True) for most in (8, 16)]
    others = [
        *(
            (tile, FP8, 128, HALF)
            for tile in (*op._FP8.values(), op._FP8_MANY_NARROW, *op._FP8_DEEP.values(), *shared, *op._MANY_FP8)
        ),
        *((tile, FP8, 128, wide) for tile in (*op._FP8.values(), *op._FP8_DEEP.values())),
        (op._FP8_OTHER_GROUPS, FP8, 64, HALF),
        *((op._FP8[most], FP8, 32, wide) for most in (8, 16, 32)),
        *((tile, HALF, 128, HALF) for tile in (*op._HALVES.values(), evolve(op._HALVES[8], shared=False), *op._MANY_HALVES)),
        *((evolve(tile, deep=False), HALF, 32, wide) for tile in op._HALVES.values()),
    ]
    return [*least, *(others if every else [])]


def _int4(*, every: bool = False) -> list[dict[str, Any]]:
    """Return, for each such tile, its sides, the matrix unit's instructions, bytes of stack, and of shared memory."""
    made, found = _compile_only(), list[dict[str, Any]]()
    codes_OI = torch.zeros(512, 1024, dtype=torch.uint8)
    for tile, dtype, group, scale_dtype in _int4_cuts(every=every):
        groups_GO = torch.zeros(1024 // group, 512, dtype=torch.uint8)
        weight = int4_weight(codes_OI, groups_GO.to(scale_dtype), groups_GO)
        x_TI, scale_T1 = torch.zeros(TOKENS, 1024, dtype=dtype), torch.ones(TOKENS, 1) if dtype == FP8 else None
        ops_linear_int4.launch_int4(torch.zeros(TOKENS, 512, dtype=HALF), x_TI, scale_T1, weight, tile)
        kernel, cut = made[-1], {"tile": str(tile), "group": group, "scales": str(scale_dtype), "inputs": str(dtype)}
        found.append(cut | {"sums": tile.tokens * tile.halves // 2, "columns": tile.tokens // tile.cuts})
        products = re.findall(r"\b((?:wgmma\.mma_async|mma\.sync)\S+) \{[^}]*\}, (\{?)", kernel.asm["ptx"])
        found[-1]["products"] = sorted({(name, "registers" if brace else "shared") for name, brace in products})
        found[-1] |= resources(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
    return found


def _gated() -> list[dict[str, Any]]:
    """Return, for tokens, a weight and a dtype, what the plain product and the one that ends in an activation compile to."""
    made, found, one = _compile_only(), list[dict[str, Any]](), torch.ones(())
    cuts = [(weight, tokens, HALF) for weight in GATED for tokens in (8, 16, 32, 64)]
    for (rows, columns), tokens, dtype in (*cuts, *((GATED[0], tokens, torch.float16) for tokens in (8, 64))):
        given = torch.empty(tokens, columns, dtype=FP8), one, torch.empty(rows, columns, dtype=FP8), torch.ones(rows, 1), dtype
        linear_fp8(*given)
        linear_silu_mul_fp8(*given, one)
        plain, gated = (resources(k.asm["cubin"]) | {"shared": k.metadata.shared, "sums": _sums(k)} for k in made[-2:])
        found.append({"rows": rows, "tokens": tokens, "dtype": str(dtype), "plain": plain, "gated": gated})
    return found


def _sums(kernel: Any) -> list[str]:
    """Return the products of the matrix unit, in order, and how their sums lie in threads."""
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    products = re.findall(r"warp_group_dot .* : (.*) loc", text)
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), each) for each in products]


def main() -> None:
    """Print what the word asks for."""
    pretend()
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "int4": _int4,
        "every int4": partial(_int4, every=True),
        "gated": _gated,
    }
    json.dump(makers[" ".join(sys.argv[1:])](), sys.stdout)


if __name__ == "__main__":
    main()
