"""How products with 4-bit weights are computed: with inputs as they are (w4a16), or each token rounded to FP8 (w4a8).

With w8a8 the weights of a large step are rounded to FP8 too, with a scale an output: the product is then a plain FP8 one. Each
such step rounds them anew, or they are kept beside the 4-bit ones.
"""

from __future__ import annotations

from attrs import frozen

from paddock.axes import RoundsInputs, Scheme
from paddock.config import AUTO, W4A8, W4A16, W8A8, EngineConfig
from paddock.errors import PlanError
from paddock.planning.hardware import Hardware
from paddock.planning.notes import ASKED, Notes
from paddock.planning.plan import Rejected

ALWAYS = 1  # from one token a step on
# Few tokens wait for the weight's bytes, which both read alike, and w4a16 rounds nothing; many wait for the matrix unit, which is
# twice as fast in FP8. On an H200 w4a8 takes 0.84 to 0.85 of w4a16's time for one token, 0.65 to 0.75 for 16 to 64, 0.6 for
# 4,096. Small steps count as padded (`planning.padding`): 9 to 15 decodes are 16 tokens.
W4A8_FROM = 16
# Rounding a weight costs a pass over it: 0.4 ps a weight on an H200, which a product of 700 tokens wins back where the plain FP8
# product runs at 1,300 TFLOP/s and w4a8 at 950.
W8A8_FROM = 1024
FP8_UNITS = (8, 9)  # the first compute capability with FP8
COST_OF_WEIGHTS = "rounding the weights of every step too raised two small models' by 0.97 and 1.53 %"
WON_BY_KEEPING = "a byte a weight more, for first tokens 8 to 10 % sooner (70B, prompts of 2,048 tokens, H200)"
COST = "rounding tokens to FP8 raised the perplexity of two small models by 0.54 and 1.19 % (docs/benchmarks/quality.md)"


@frozen(kw_only=True)
class Int4Compute:
    """From how many tokens a step on 4-bit linears take FP8 inputs, and round their weights to FP8; None for never.

    `keeps_weights`: they are rounded once and kept.
    """

    inputs_from: int | None = None
    weights_from: int | None = None
    keeps_weights: bool = False

    def makes_weights(self, tokens: int) -> bool:
        """Return whether a step of so many tokens rounds weights, one at a time."""
        return self.weights_from is not None and not self.keeps_weights and tokens >= self.weights_from

    def check_reached(self, tokens: int) -> None:
        """Raise PlanError where weights are kept for steps larger than any, which compute `tokens`."""
        if self.keeps_weights and self.weights_from is not None and tokens < self.weights_from:
            raise PlanError(
                f"keep_fp8_weights keeps weights for steps of {self.weights_from} tokens and more, and the largest has {tokens}",
                fix=f"raise max_num_batched_tokens to {self.weights_from} or more, or leave out keep_fp8_weights",
            )


def choose_int4(config: EngineConfig, hardware: Hardware, scheme: Scheme, dtype: str, notes: Notes) -> Int4Compute:
    """Return how 4-bit linears compute; never in FP8 where no linear has 4 bits.

    Raises PlanError where the scheme leaves nothing to choose but a choice was asked for, and where FP8 cannot run.
    """
    asked = config.int4_compute
    if config.keep_fp8_weights and (asked != W8A8 or not isinstance(scheme, RoundsInputs)):
        what = f"int4_compute is {asked!r}" if isinstance(scheme, RoundsInputs) else f"quantization is {scheme.name}"
        raise PlanError(
            f"keep_fp8_weights keeps 4-bit weights that large steps round to FP8, and {what}, which rounds none",
            fix=f"set int4_compute to {W8A8} with 4-bit weights, or leave out keep_fp8_weights",
        )
    if not isinstance(scheme, RoundsInputs):
        if asked != AUTO:
            raise PlanError(
                f"int4_compute is {asked!r}, but the weights are no 4-bit integers (quantization {scheme.name})",
                fix="leave int4_compute at auto, or use a checkpoint with 4-bit weights",
            )
        return Int4Compute()
    lacking = _why_no_fp8(hardware)
    made_for_fp8 = scheme.fp8_inputs_from is not None
    if asked in (W4A8, W8A8) or (asked == AUTO and made_for_fp8):
        if lacking:
            named = f"int4_compute is {asked!r}" if asked != AUTO else f"{scheme.name} computes {W4A8}"
            raise PlanError(
                f"{named}, which {lacking}",
                fix=f"set int4_compute to {W4A16}, or use a GPU of compute capability 8.9 or later",
            )
        if asked == W8A8:
            keeps = config.keep_fp8_weights
            value = f"{W4A8} below {W8A8_FROM} tokens a step, weights rounded to FP8 from there on" + (
                ", and kept" if keeps else ""
            )
            rejected = [] if keeps else [Rejected("keep_fp8_weights", f"not asked for; {WON_BY_KEEPING}")]
            notes.choose("int4_compute", value, f"{ASKED}; {COST}; {COST_OF_WEIGHTS}", rejected)
            return Int4Compute(inputs_from=ALWAYS, weights_from=W8A8_FROM, keeps_weights=keeps)
        rejected = [] if asked == W4A8 else [Rejected(W4A16, f"not what {scheme.name} was made for; ask for it to have it")]
        notes.choose("int4_compute", W4A8, f"{ASKED}; {COST}" if asked == W4A8 else "the checkpoint was made for it", rejected)
        return Int4Compute(inputs_from=ALWAYS)
    if asked == W4A16:
        notes.choose("int4_compute", W4A16, ASKED)
        return Int4Compute()
    return _automatic(hardware, dtype, lacking, notes)


def _automatic(hardware: Hardware, dtype: str, lacking: str, notes: Notes) -> Int4Compute:
    """Return what is chosen for a checkpoint made for inputs as they are."""
    against = lacking
    if hardware.device == "cpu":
        against = "a CPU has no FP8 products, so it would cost accuracy and win nothing"
    elif dtype == "float32":
        against = "float32 is chosen to be exact, and FP8 is not"
    if against:
        notes.choose("int4_compute", W4A16, "inputs stay as they are", [Rejected(W4A8, against)])
        return Int4Compute()
    notes.choose(
        "int4_compute",
        f"{W4A16} below {W4A8_FROM} tokens a step, {W4A8} from there on",
        f"few tokens wait for the weight's bytes, many for arithmetic, twice as fast in FP8; padding counts; {COST}",
        [
            Rejected(W4A16, "slower prefill and large batches"),
            Rejected(W4A8, "rounds few tokens too; products of one token come 15 % sooner"),
        ],
    )
    return Int4Compute(inputs_from=W4A8_FROM)


def _why_no_fp8(hardware: Hardware) -> str:
    """Return why that hardware cannot multiply FP8, an empty text where it can; a CPU computes the definition."""
    have = hardware.compute_capability
    if hardware.device != "cuda" or (have is not None and have >= FP8_UNITS):
        return ""
    least = ".".join(map(str, FP8_UNITS))
    return f"needs compute capability {least}, {hardware.name} has {'none' if have is None else '.'.join(map(str, have))}"
