"""What the plugin declares, it serves: every combination of what its specs list, in a small step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.layers import torch_dtype as named
from paddock.plugins import OpSpec, resolve
from paddock.testing.kernels import HEADS, check_cache_op, check_op
from paddock_triton import plugin

ON_GPU = torch.cuda.is_available()
(SPEC,) = plugin.paddock_attention_backends()
FEATURES = ("", *sorted(SPEC.features))
AXES = tuple(sorted(axis, key=str) for axis in (SPEC.dtypes, SPEC.kv_cache_dtypes, SPEC.head_dims, SPEC.page_sizes))
BATCH = [(70, 1), (0, 1), (129, 1), (0, 17), (63, 66)]
PAGE_OPS = ("rope_and_cache", "cache_kv")
ROW_OPS = ("embed", "linear", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "silu_mul", "gelu")
HELD = [spec for spec in plugin.paddock_ops() if spec.op in (*PAGE_OPS, *ROW_OPS)]  # sampling and FP8 have tests of their own


def _declared() -> list[tuple[str, str, int, int, str]]:
    """Return every dtype, KV dtype, head size and page size, each with one feature in turn."""
    found = []
    for indices in product(*(range(len(axis)) for axis in AXES)):
        values = [axis[i] for axis, i in zip(AXES, indices, strict=True)]
        found.append((*values, FEATURES[sum(indices) % len(FEATURES)]))
    return found  # type: ignore[return-value]


def _in_the_interpreter(combination: tuple[str, str, int, int, str]) -> bool:
    """Return whether Triton's interpreter can run it, in moments: it cuts bfloat16 off."""
    dtype, kv_dtype, head, _, _ = combination
    return dtype == "float16" and kv_dtype != "bfloat16" and head in (16, 48, 80)


DECLARED = _declared()


def test_every_feature_meets_every_pair_of_the_other_choices() -> None:
    """Though each combination is tried with one feature, no feature is left out for any two values of the other axes."""
    for first, second in combinations(range(4), 2):
        met = {(row[first], row[second], row[4]) for row in DECLARED}
        wanted = len(AXES[first]) * len(AXES[second]) * len(FEATURES)
        assert len(met) == wanted, (first, second)


@pytest.mark.parametrize(
    "combination",
    DECLARED if ON_GPU else [row for row in DECLARED if _in_the_interpreter(row)],
    ids=lambda row: "-".join(map(str, row)),
)
def test_a_declared_combination_is_served(combination: tuple[str, str, int, int, str], case: Callable[..., Any]) -> None:
    """Decodes and prefills at page edges give dense attention, whatever dtype, KV dtype, head size, page size and feature."""
    dtype, kv_dtype, head, page, feature = combination
    kept = reference.FP8 if kv_dtype == "fp8" else named(kv_dtype)
    step = case(BATCH if ON_GPU else BATCH[2:4], (6, 2, head), dtype=named(dtype), page_size=page, kv_dtype=kept)
    backend = resolve(SPEC.factory)(step.needs, step.q_THD.device)
    params = step.params(*([feature] if feature else []))
    step.check(step.attend(backend, params), params)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", HELD, ids=lambda spec: spec.op)
def test_an_op_serves_every_declared_dtype(spec: OpSpec) -> None:
    """Odd sizes, no tokens at all and the smallest heads, in each dtype, on the GPU."""
    dtypes, implementation = [named(dtype) for dtype in sorted(spec.dtypes)], resolve(spec.implementation)
    if spec.op in PAGE_OPS:
        check_cache_op(spec.op, implementation, device="cuda", dtypes=dtypes, heads=[*HEADS, (8, 2, 8), (71, 1, 64), (3, 1, 256)])
    else:
        check_op(spec.op, implementation, device="cuda", dtypes=dtypes)
