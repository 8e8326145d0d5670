"""How products with 4-bit weights take their inputs: as they are (w4a16), or each token rounded to FP8 (w4a8)."""

from __future__ import annotations

from paddock.axes import RoundsInputs, Scheme
from paddock.config import AUTO, W4A8, W4A16, EngineConfig
from paddock.errors import PlanError
from paddock.planning.hardware import Hardware
from paddock.planning.notes import ASKED, Notes
from paddock.planning.plan import Rejected

ALWAYS = 1  # from one token a step on
# Few tokens wait for the weight's bytes, which both read alike, and w4a16 rounds nothing; many wait for the matrix unit, which is
# twice as fast in FP8. By arithmetic an H200 computes for longer than it reads from 41 tokens on with w4a16; where the kernels of
# the two meet has not been measured. Small steps count as padded (`planning.padding`): 9 to 15 decodes are 16 tokens.
W4A8_FROM = 16
FP8_UNITS = (8, 9)  # the first compute capability with FP8
COST = "rounding tokens to FP8 raised the perplexity of two small models by 0.55 and 1.26 % (docs/benchmarks/quality.md)"


def choose_inputs(config: EngineConfig, hardware: Hardware, scheme: Scheme, dtype: str, notes: Notes) -> int | None:
    """Return from how many tokens a step on 4-bit linears take FP8, None for never and where no linear has 4 bits.

    Raises PlanError where the scheme leaves nothing to choose but a choice was asked for, and where w4a8 cannot run.
    """
    asked = config.int4_compute
    if not isinstance(scheme, RoundsInputs):
        if asked != AUTO:
            raise PlanError(
                f"int4_compute is {asked!r}, but the weights are no 4-bit integers (quantization {scheme.name})",
                fix="leave int4_compute at auto, or use a checkpoint with 4-bit weights",
            )
        return None
    lacking = _why_no_fp8(hardware)
    made_for_fp8 = scheme.fp8_inputs_from is not None
    if asked == W4A8 or (asked == AUTO and made_for_fp8):
        if lacking:
            named = f"int4_compute is {W4A8!r}" if asked == W4A8 else f"{scheme.name} computes {W4A8}"
            raise PlanError(
                f"{named}, which {lacking}",
                fix=f"set int4_compute to {W4A16}, or use a GPU of compute capability 8.9 or later",
            )
        rejected = [] if asked == W4A8 else [Rejected(W4A16, f"not what {scheme.name} was made for; ask for it to have it")]
        notes.choose("int4_compute", W4A8, f"{ASKED}; {COST}" if asked == W4A8 else "the checkpoint was made for it", rejected)
        return ALWAYS
    if asked == W4A16:
        notes.choose("int4_compute", W4A16, ASKED)
        return None
    return _automatic(hardware, dtype, lacking, notes)


def _automatic(hardware: Hardware, dtype: str, lacking: str, notes: Notes) -> int | None:
    """Return the border for a checkpoint made for inputs as they are."""
    against = lacking
    if hardware.device == "cpu":
        against = "a CPU has no FP8 products, so it would cost accuracy and win nothing"
    elif dtype == "float32":
        against = "float32 is chosen to be exact, and FP8 is not"
    if against:
        notes.choose("int4_compute", W4A16, "inputs stay as they are", [Rejected(W4A8, against)])
        return None
    notes.choose(
        "int4_compute",
        f"{W4A16} below {W4A8_FROM} tokens a step, {W4A8} from there on",
        f"few tokens wait for the weight's bytes, many for arithmetic, twice as fast in FP8; padding counts; {COST}",
        [Rejected(W4A16, "slower prefill and large batches"), Rejected(W4A8, "no faster for few tokens")],
    )
    return W4A8_FROM


def _why_no_fp8(hardware: Hardware) -> str:
    """Return why that hardware cannot multiply FP8, an empty text where it can; a CPU computes the definition."""
    have = hardware.compute_capability
    if hardware.device != "cuda" or (have is not None and have >= FP8_UNITS):
        return ""
    least = ".".join(map(str, FP8_UNITS))
    return f"needs compute capability {least}, {hardware.name} has {'none' if have is None else '.'.join(map(str, have))}"
