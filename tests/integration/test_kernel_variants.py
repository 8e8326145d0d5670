"""The benchmarks of kernels to choose from, as far as they go without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from click.testing import CliRunner
from plugins.triton.tests.apart import run

pytest.importorskip("triton")

from tests.bench import decode_variants
from tests.bench.decode_variants import Cut

SAYS = r"^{name} +\d+ registers, 0 spills, \d+ bytes shared"


FEW = r", wgmma\.mma_async\.sync\.aligned\.m64n{}k32\.f32\.e4m3\.e4m3 x {}, {} waits$"
VARIANTS = {
    "prefill_variants": {"64 x 64, 4 warps": "$", "fp8 arithmetic, 128 x 64, 8 warps": "$"},
    "decode_variants": {"decode 64 x 8k: 3 stages": "$"},
    "block_variants": {"ring 64 tokens": "$", "one 2x8192 w8": "$"},
    "fp8_variants": {
        "ring 8 t4 s5 r2048 shared": FEW.format(8, 16, 4),
        "ring 64 t2 s5 r1536 whole": FEW.format(64, 8, 2),
    },
    "int4_to_fp8_variants": {"*o64 b1": ", 8 loads and 16 stores of 16 bytes$"},
    "int4_variants": {
        "*fp8 n128 h1 t2 c1 s6 r2048 shared late": r", wgmma\.mma_async\S*e4m3\.e4m3$",
        "bf16 n8 h1 t4 c1 s6 r2048 shared": r", mma\.sync\S*bf16\.bf16\.f32$",
    },
}


@pytest.mark.parametrize("module", VARIANTS)
def test_variants_are_compiled_without_a_gpu(module: str) -> None:
    """Each says its registers, spills and shared memory; products their instruction."""
    words = [word for name in VARIANTS[module] for word in ("--only", name)]
    ran = run(f"tests.bench.{module}", "--compile", *words)
    assert ran.returncode == 0, ran.stderr
    for name, more in VARIANTS[module].items():
        assert re.search(SAYS.format(name=re.escape(name)) + more, ran.stdout, re.MULTILINE), ran.stdout


def _list(monkeypatch: pytest.MonkeyPatch, *options: str) -> list[str]:
    """Return the lines of decode's cuts of 2k, of which "no pairs" is wrong and the n-th to be timed takes n microseconds."""
    timed: list[Cut] = []

    def check(cut: Cut, _: object) -> None:
        assert cut.tile is None or cut.tile.pairs, "wrong"

    def percent(cut: Cut, _: object) -> tuple[float, float]:
        timed.append(cut)
        return len(timed), 50.0

    monkeypatch.setattr(decode_variants, "check", check)
    monkeypatch.setattr(decode_variants, "percent", percent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    result = CliRunner().invoke(decode_variants.main, ["--only", "decode 64 x 2k: ", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[1:]


@pytest.mark.parametrize(("options", "times"), [((), 1), (("--repeat", "3"), 3)])
def test_decode_cuts_are_timed_in_turn(options: tuple[str, ...], times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as asked, the whole list before it begins anew; a wrong cut is told of once and has no time."""
    wrong, *timed = _list(monkeypatch, *options)
    assert re.fullmatch(r"decode 64 x 2k: no pairs +AssertionError wrong.*", wrong)
    found = [re.fullmatch(r"decode 64 x 2k: (.*?) +(\d+)\.0 us +50\.0 %", line) for line in timed]
    names = ["served", "3 stages", "2 warps", "copy engine, the last tile apart", "3 programs"] * times
    assert [line and line.groups() for line in found] == [(name, str(n)) for n, name in enumerate(names, 1)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "two tiles"], "no cut holds 'two tiles'; there are decode 64 x 8k: served; "),
        (["--repeat", "0"], "0 is not in the range"),
        (["--repeat", "2", "--compile"], "--repeat 2 is for what is timed"),
    ],
)
def test_decode_cuts_that_cannot_be_listed_are_refused(options: list[str], says: str) -> None:
    """An unknown word, no round at all, and rounds of what has no time are errors that name the value."""
    result = CliRunner().invoke(decode_variants.main, options)
    assert result.exit_code == 2
    assert says in result.output
