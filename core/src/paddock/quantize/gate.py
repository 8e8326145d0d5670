"""The gate: a quantised model's perplexity against its source's, on text that calibration never read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from paddock.config import EngineConfig
from paddock.errors import OptionError, QualityError
from paddock.llm import LLM
from paddock.request import SamplingParams

_WINDOW = 2048


@frozen(kw_only=True)
class Perplexity:
    """How well a model predicts a text: `nats` summed over `tokens` predicted tokens, and exp(nats / tokens)."""

    tokens: int
    nats: float
    perplexity: float


def measure(folder: str, config: EngineConfig, text: str, *, plugins: tuple[object, ...], autoload: bool) -> dict[str, Any]:
    """Return the perplexity of the model in a folder on a text; raise OptionError where the text is too short."""
    names = ("device", "strict", "revision", "tokenizer", "ignore_config_keys")
    options: dict[str, Any] = {name: getattr(config, name) for name in names} | {"prefer": dict(config.prefer)}
    if folder != config.model:
        options["revision"] = None
    with LLM(folder, plugins=plugins, autoload=autoload, progress=False, **options) as llm:
        found = _perplexity(llm, text, window=_WINDOW)
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


def _perplexity(llm: LLM, text: str, *, window: int = 2048) -> Perplexity:
    """Return the perplexity of consecutive windows, each predicted from its own tokens, its first being given."""
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(text)
    window = min(window, llm.max_model_len - 1)
    pieces = [piece for start in range(0, len(ids), window) if len(piece := ids[start : start + window]) > 1]
    if not pieces:
        raise OptionError(f"the gate's text has {len(ids)} tokens", fix="give a longer one with --gate-text FILE")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    nats, tokens = 0.0, 0
    for piece in pieces:
        (output,) = llm.generate([piece], params, progress=False)
        if output.finish_reason == "error" or output.prompt_logprobs is None:
            return Perplexity(tokens=0, nats=math.nan, perplexity=math.nan)
        for token, listed in zip(piece[1:], output.prompt_logprobs[1:], strict=True):
            assert listed is not None
            nats -= listed[token].logprob
            tokens += 1
    return Perplexity(tokens=tokens, nats=nats, perplexity=math.exp(nats / tokens))
