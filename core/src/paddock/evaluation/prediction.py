"""Perplexity of a text."""

from __future__ import annotations

import math

from attrs import frozen

from paddock.errors import PaddockError
from paddock.evaluation.scoring import scored
from paddock.evaluation.texts import Progress, TextOrIds, check_window, perplexity_of, token_ids, windows
from paddock.llm import LLM

DEFINITIONS = {
    "perplexity": ("perplexity", "", "e to the mean negative log-likelihood of a scored token"),
    "nats": ("nats a token", "nats", "mean negative log-likelihood of a scored token, natural logarithm"),
    "tokens": ("tokens scored", "tokens", "all tokens of the windows but the first of each"),
    "windows": ("windows", "", "that do not overlap; a token is predicted from those before it in its window alone"),
}


@frozen(kw_only=True)
class Perplexity:
    """How well a model predicts a text: `nats` the mean negative log-likelihood of the `tokens` scored, in `windows` windows."""

    tokens: int
    nats: float
    windows: int

    @property
    def perplexity(self) -> float:
        """Return e to the nats."""
        return perplexity_of(self.nats)


def perplexity(
    llm: LLM, text_or_ids: TextOrIds, *, window: int = 2048, limit: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Return the perplexity of a text, or of token ids, in windows of `window` tokens, all of them through the engine at once.

    The text is encoded once, with a bos token where the tokenizer puts one, then cut: later windows begin without one. Windows do
    not overlap; the first token of each is not scored, and the last window may be shorter. That is how GPTQ's authors and most
    papers on quantisation after them measure (they drop the last, shorter window). `limit` takes the first so many windows;
    `progress` is called with the windows done and those in all. Raises RequestError for a text of fewer than two tokens and
    for a window that does not fit max_model_len; PaddockError where the model's logits are not finite.
    """
    check_window(window, llm.max_model_len, limit=limit)
    most = None if limit is None else limit * window
    cut = windows(token_ids(llm, text_or_ids, most=most), window, limit=limit)
    sums: dict[int, float] = {}
    for index, logprobs in scored(llm, cut):
        sums[index] = math.fsum(logprobs)
        if progress is not None:
            progress(len(sums), len(cut))
    tokens = sum(len(each) - 1 for each in cut)
    nats = -math.fsum(sums.values()) / tokens
    if not math.isfinite(nats):
        raise PaddockError(
            f"the text has {nats} nats a token: the model's logits are not finite, or give a token no chance",
            fix="try another dtype",
        )
    return Perplexity(tokens=tokens, nats=nats, windows=len(cut))
