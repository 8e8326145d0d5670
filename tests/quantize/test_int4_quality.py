"""The table of what FP8 inputs cost 4-bit weights, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paddock.errors import OptionError
from paddock_quant_awq.words import AWQ_ORDER, unpack
from tests.bench.fp8_quality import Settings
from tests.bench.int4_quality import main, measured, rounded, save_rounded

pytestmark = pytest.mark.bench


def test_a_weight_is_rounded_to_the_nearest() -> None:
    """No weight is further from what it is stored as than half a scale, nor, at a group's ends, than its zero is rounded."""
    weight_OI = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    found = rounded(weight_OI, 32)
    codes_IO, zeros_GO = unpack(found.qweight, AWQ_ORDER), unpack(found.qzeros, AWQ_ORDER)
    scales_IO, zeros_IO = (x.float().repeat_interleave(32, dim=0) for x in (found.scales, zeros_GO))
    away_IO = ((codes_IO.float() - zeros_IO) * scales_IO - weight_OI.T).abs() / scales_IO
    assert away_IO.max() < 1.02
    assert (away_IO <= 0.501).float().mean() > 0.95


def test_rounded_inputs_are_held_to_inputs_as_they_are(llama: Path) -> None:
    """Both are away from the plain model, most of it by the weights; FP8 inputs move the logits by a few hundredths."""
    sums = measured(llama, Settings(text="generated", windows=3, window=24), 16)
    errors = {pair: (each.squares / each.windows) ** 0.5 for pair, each in sums.items()}
    assert 0.005 < errors["w4a16", "w4a8"] < errors["plain", "w4a16"] < 1
    assert all(each.tokens == 3 * 23 and each.kl > 0 for each in sums.values())


def test_groups_that_do_not_divide_are_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one that does."""
    with pytest.raises(OptionError, match="groups of 48 do not divide") as error:
        save_rounded(llama, tmp_path / "out", 48)
    assert error.value.fix == "give --group 16"
    assert main([str(llama), "--group", "48", "--windows", "1", "--window", "24"]) == 1
    assert "groups of 48 do not divide" in capsys.readouterr().err
