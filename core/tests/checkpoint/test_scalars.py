"""Single numbers read out of safetensors files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.tests.checkpoint.test_source import write_model
from safetensors.torch import save_file

from paddock.checkpoint.index import stored_tensors
from paddock.checkpoint.scalars import stored_scalars
from paddock.checkpoint.source import open_source


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_float_of_any_size_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wherever it lies in the file, with axes of one element or without."""
    values = {"a": torch.tensor(0.375), "b": torch.tensor([[-2.0]]), "c": torch.tensor([1.0])}
    rest = {"between": torch.arange(7), "several": torch.ones(2), "whole": torch.tensor(3)}
    save_file({name: each.to(dtype) for name, each in values.items()} | rest, tmp_path / "model.safetensors")
    assert stored_scalars(stored_tensors(tmp_path), [*values, *rest, "nowhere"]) == {"a": 0.375, "b": -2.0, "c": 1.0}


def test_weights_that_are_not_sound_have_none(tmp_path: Path) -> None:
    """What is wrong with them is said where they are read."""
    write_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no header")
    assert open_source(str(tmp_path / "m")).read_scalars(["a"]) == {}
