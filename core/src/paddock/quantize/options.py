"""What a user asks of `paddock quantize`, checked once. Free of torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from attrs import Attribute, field, frozen

from paddock.errors import OptionError

DEFAULT_TEXT = "default"  # as `calibration`: the text that comes with Paddock
DEFAULT_SAMPLES = 128  # as AutoAWQ
DEFAULT_LENGTH = 512  # as ModelOpt and AutoAWQ
MAX_SHARD_BYTES = 2_000_000_000
_GATE = re.compile(r"\s*ppl\s*<=\s*(\d+(?:\.\d+)?)\s*%\s*")


def _at_least(low: int) -> Any:
    def validate(_: object, attribute: Attribute[Any], value: object) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise OptionError(f"{attribute.name} is {value!r}", fix=f"give a whole number, at least {low}")

    return validate


def _true_or_false(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise OptionError(f"{attribute.name} is {value!r}", fix="give True or False")


def _share(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
        raise OptionError(f"{attribute.name} is {value!r}", fix="give a share such as 0.01, or parse_gate('ppl<=1%')")


def parse_gate(text: str) -> float:
    """Return how much a perplexity may grow, as a share: 0.01 for `ppl<=1%`; raise OptionError for any other form."""
    match = _GATE.fullmatch(text)
    if match is None:
        raise OptionError(f"gate is {text!r}", fix="write it as ppl<=1%: perplexity may grow by at most that much")
    return float(match[1]) / 100


@frozen(kw_only=True)
class QuantizeOptions:
    """How to quantise. `calibration` is a UTF-8 text file, or `default`; None means `default` where a text is needed.

    `samples` None takes as many sequences as the text gives, at most 128; `sequence_length` None is 512 tokens, or what the model
    takes if that is less. `gate` is the share by which perplexity may grow, None for no gate, measured on `gate_text` or else on
    the last fifth of the calibration text, which calibration never reads. A shard has at most `max_shard_bytes`, unless one
    tensor alone has more. A calibration text that nothing reads is no error: a warning says so.
    `group_size`, `scheme`, `format`, `tp_compatible` (ranks whose shares must not slice a group) and `zero_points` (whether a
    group's range may lie unevenly about 0) are for recipes that read them; None leaves them to the recipe.
    Raises OptionError for a value out of range.
    """

    recipe: str
    out: Path = field(converter=Path)
    kv_cache_dtype: str | None = None
    calibration: str | None = None
    samples: int | None = field(default=None, validator=_at_least(1))
    sequence_length: int | None = field(default=None, validator=_at_least(2))
    gate: float | None = field(default=None, validator=_share)
    gate_text: Path | None = None
    max_shard_bytes: int = field(default=MAX_SHARD_BYTES, validator=_at_least(1))
    group_size: int | None = field(default=None, validator=_at_least(1))
    scheme: str | None = None
    format: str | None = None
    tp_compatible: int | None = field(default=None, validator=_at_least(1))
    zero_points: bool | None = field(default=None, validator=_true_or_false)

    def __attrs_post_init__(self) -> None:
        """Refuse a text that has no name, and one that nothing would read."""
        if self.calibration == "":
            raise OptionError("calibration is ''", fix=f"name a file, or {DEFAULT_TEXT} for the text that comes with Paddock")
        if self.gate_text is not None and self.gate is None:
            raise OptionError(
                f"gate_text is {str(self.gate_text)!r}, but there is no gate", fix="add a gate, as in --gate 'ppl<=1%'"
            )
