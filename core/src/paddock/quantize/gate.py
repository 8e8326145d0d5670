"""The gate: a quantised model's perplexity against its source's, on text that calibration never read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddock import log
from paddock.config import EngineConfig
from paddock.errors import OptionError, PaddockError, QualityError, RequestError
from paddock.evaluation import perplexity
from paddock.llm import LLM

_WINDOW = 2048


def measure(folder: str, config: EngineConfig, text: str, *, plugins: tuple[object, ...], autoload: bool) -> dict[str, Any]:
    """Return the perplexity of the model in a folder on a text; NaN, with a warning that says why, where it has none.

    Raises OptionError where the text is too short.
    """
    names = ("device", "strict", "revision", "tokenizer", "ignore_config_keys")
    options: dict[str, Any] = {name: getattr(config, name) for name in names} | {"prefer": dict(config.prefer)}
    if folder != config.model:
        options["revision"] = None
    with LLM(folder, plugins=plugins, autoload=autoload, progress=False, **options) as llm:
        try:
            found = perplexity(llm, text, window=min(_WINDOW, llm.max_model_len - 1))
        except RequestError as error:
            raise OptionError(f"the gate's text: {error.message}", fix="give a longer one with --gate-text FILE") from error
        except PaddockError as error:
            log.get_logger().warning("perplexity_not_measured", model=folder, message=error.message, fix=error.fix)
            return {"tokens": 0, "nats": math.nan, "perplexity": math.nan}
    return {"tokens": found.tokens, "nats": found.nats, "perplexity": found.perplexity}


def growth(gate: Mapping[str, Any]) -> float:
    """Return by which share perplexity has grown."""
    return float(gate["after"]["perplexity"] / gate["before"]["perplexity"] - 1)


def require_passed(folder: Path, gate: Mapping[str, Any]) -> None:
    """Raise QualityError where perplexity has grown by more than the gate allows, or is no number."""
    grown = growth(gate)
    if not grown <= gate["limit"]:
        before, after = gate["before"]["perplexity"], gate["after"]["perplexity"]
        raise QualityError(
            f"perplexity has grown by {grown:.2%}, from {before:.3f} to {after:.3f}; the gate allows {gate['limit']:.2%}. "
            f"The model stays in {folder}, marked failed",
            fix="use another recipe, or calibrate on more text of the kind the model will read",
        )
