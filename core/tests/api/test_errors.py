"""What errors say."""

from __future__ import annotations

import pytest

from paddock.errors import PaddockError, did_you_mean


@pytest.mark.parametrize(
    ("name", "advice"),
    [("dtyp", "did you mean 'dtype'?"), ("DType", "did you mean 'dtype'?"), ("Seed", "did you mean 'seed'?")],
)
def test_the_nearest_name_is_suggested_whatever_its_case(name: str, advice: str) -> None:
    """A slip of the shift key is a slip like another."""
    assert did_you_mean(name, ["dtype", "seed", "model"]) == advice


def test_where_no_name_is_near_all_are_given() -> None:
    """Sorted, each once."""
    assert did_you_mean("xyzzy", ["seed", "dtype", "seed"]) == "known: dtype, seed"
    assert did_you_mean("xyzzy", []) == "none is known"


def test_an_error_shows_its_way_out_on_a_line_of_its_own() -> None:
    """Without a way out it is its message."""
    assert str(PaddockError("no", fix="do")) == "no\n  fix: do"
    assert str(PaddockError("no")) == "no"
