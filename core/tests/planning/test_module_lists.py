from __future__ import annotations

import pytest

from paddock import module_lists
from paddock.errors import ModelConfigError
from paddock.model_config import ConfigReader

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
        ("*.router", False),
    ],
)
def test_modelopt_lists_hold_shell_patterns_and_plain_parts(entry: str, listed: bool) -> None:
    """An entry with wildcards stands for the whole path; one without may be any part of it."""
    assert module_lists.in_modelopt((entry,), PATH) is listed


def test_a_part_of_a_path_does_not_end_inside_a_number() -> None:
    """`model.layers.1` spares the second layer, not the eleventh."""
    assert not module_lists.in_modelopt(("model.layers.1",), "model.layers.10.mlp.down_proj")
    assert module_lists.in_modelopt(("model.layers.1",), PATH)


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
    assert module_lists.compressed_rank(entry, PATH, head=False) == rank
    assert module_lists.in_compressed((entry,), PATH, head=False) is (rank is not None)


def test_a_head_is_a_linear_but_no_falcon_linear() -> None:
    """Falcon's own class, which `Linear` includes, is that of its layers' linears alone."""
    assert module_lists.in_compressed(("Linear",), "lm_head", head=True)
    assert not module_lists.in_compressed(("FalconLinear",), "lm_head", head=True)


def test_targets_are_names_and_patterns() -> None:
    """Anything else is an error with the key and the value."""
    reader = ConfigReader({})
    assert module_lists.compressed_targets(reader, "targets", ["Linear", "re:.*mlp"]) == ("Linear", "re:.*mlp")
    for listed in (None, [], "Linear", [""], [1]):
        with pytest.raises(ModelConfigError, match="targets is"):
            module_lists.compressed_targets(reader, "targets", listed)
    with pytest.raises(ModelConfigError, match=r"targets is 're:\('"):
        module_lists.compressed_targets(reader, "targets", ["Linear", "re:("])
    module_lists.check_compressed(reader, "ignore", ["("])  # no pattern
