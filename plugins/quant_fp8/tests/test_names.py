from __future__ import annotations

import pytest

from paddock_quant_fp8 import names

PATH = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("entry", "listed"),
    [
        (PATH, True),
        ("*.down_proj", True),
        ("model.layers.1*", True),
        ("model.layers.1.mlp*", True),
        ("model.layers.?.mlp.*", True),
        ("*lm_head*", False),
        ("model.layers.11*", False),
        ("down_proj", True),  # a plain part, as older files have it
        ("mlp", True),
        ("model.layers.1", True),
        ("self_attn", False),
        ("model.layers.1.mlp.Down_proj", False),
    ],
)
def test_modelopt_lists_hold_shell_patterns_and_plain_parts(entry: str, listed: bool) -> None:
    """An entry with wildcards stands for the whole path; one without may be any part of it."""
    assert names.in_wildcards((entry,), PATH) is listed


def test_a_part_of_a_path_does_not_end_inside_a_number() -> None:
    """`model.layers.1` spares the second layer, not the eleventh."""
    assert not names.in_wildcards(("model.layers.1",), "model.layers.10.mlp.down_proj")
    assert names.in_wildcards(("model.layers.1",), PATH)


@pytest.mark.parametrize(
    ("entry", "rank"),
    [
        (PATH, 0),
        (r"re:model\.layers\.1\.", 1),
        ("re:.*down_proj$", 1),
        ("re:down_proj", None),  # patterns match from the beginning
        ("re:.*layers.11", None),
        ("Linear", 2),
        ("FalconLinear", 2),
        ("Module", 2),
        ("LlamaMLP", None),  # the class of what is around it
        ("model.layers.1.mlp", None),  # nor does a path around it count
        ("down_proj", None),
    ],
)
def test_compressed_tensors_name_a_path_a_pattern_or_a_class(entry: str, rank: int | None) -> None:
    """The closer an entry names a linear, the lower its rank."""
    assert names.target_rank(entry, PATH, head=False) == rank
    assert names.in_targets((entry,), PATH, head=False) is (rank is not None)


def test_a_head_is_a_linear_but_no_falcon_linear() -> None:
    """Falcon's own class, which `Linear` includes, is that of its layers' linears alone."""
    assert names.in_targets(("Linear",), "lm_head", head=True)
    assert not names.in_targets(("FalconLinear",), "lm_head", head=True)
