"""The benchmark of tiles among a layer's other kernels, as far as it goes without a GPU: what it puts in place of what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from paddock_triton import attention, linear_ring, ops_linear, ops_linear_int4
from tests.bench import layer_tiles


@pytest.mark.parametrize(("rows", "kind"), [(1, "ring"), (64, "ring"), (1, "int4"), (20, "int4"), (2, "products")])
def test_each_candidate_is_another_tile_and_is_gone_after_it(rows: int, kind: str) -> None:
    """What is served comes first and last; each tile in between can be made."""
    quantization = None if kind == "products" else "some"
    plan = SimpleNamespace(quantization=quantization, fp8_inputs_from=1 if kind == "int4" else None, kv_cache_dtype="fp8")
    given: Any = SimpleNamespace(plan=plan)

    def there() -> list[Any]:
        tiles = [*linear_ring.TILES.values(), *ops_linear_int4._FP8.values(), *ops_linear_int4._FP8_DEEP.values()]
        return [*tiles, vars(attention)["decode_tile"], vars(ops_linear)["serves"]]

    served, names = there(), []
    for name, put in layer_tiles.candidates(given, rows):
        with pytest.MonkeyPatch.context() as patch:
            put(patch)
            assert (there() == served) == (name == "served"), name
        assert there() == served
        names.append(name)
    assert names[0] == names[-1] == "served"
    assert len(names) == len({*names}) + 1
    assert any(name.startswith(kind) for name in names)
