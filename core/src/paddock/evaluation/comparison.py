"""Two engines over the same tokens."""

from __future__ import annotations

import math

from attrs import define, field, frozen

from paddock.errors import PaddockError, RequestError
from paddock.evaluation.scoring import scored
from paddock.evaluation.texts import Progress, TextOrIds, check_window, perplexity_of, token_ids, windows
from paddock.llm import LLM

DEFINITIONS = {
    "kl": ("KL divergence", "nats", "mean over the scored tokens of KL(A || B), over the whole vocabulary"),
    "kl_max": ("largest KL", "nats", "the largest of any token"),
    "top1": ("same first choice", "", "share of tokens for which A and B find the same token the likeliest"),
    "perplexity_a": ("perplexity of A", "", "e to the mean negative log-likelihood of a scored token"),
    "perplexity_b": ("perplexity of B", "", "e to the mean negative log-likelihood of a scored token"),
    "tokens": ("tokens scored", "tokens", "all tokens of the windows but the first of each"),
    "windows": ("windows", "", "that do not overlap; a token is predicted from those before it in its window alone"),
}


@frozen(kw_only=True)
class Comparison:
    """How far the distributions of B are from those of A, over the `tokens` scored; `kl` and `kl_max` in nats."""

    tokens: int
    windows: int
    kl: float
    kl_max: float
    top1: float
    nats_a: float
    nats_b: float

    @property
    def perplexity_a(self) -> float:
        """Return e to the nats of A."""
        return perplexity_of(self.nats_a)

    @property
    def perplexity_b(self) -> float:
        """Return e to the nats of B."""
        return perplexity_of(self.nats_b)


@define
class _Sums:
    """What was found in the windows so far."""

    kl: list[float] = field(factory=list)
    same: list[float] = field(factory=list)
    logprobs_a: list[float] = field(factory=list)
    logprobs_b: list[float] = field(factory=list)


def compare(
    a: LLM, b: LLM, text_or_ids: TextOrIds, *, window: int = 512, limit: int | None = None, progress: Progress | None = None
) -> Comparison:
    """Return how far `b`'s distributions are from `a`'s over the same tokens; `a` and `b` may be one LLM.

    Windows are as in `perplexity`, one at a time through `a`, then through `b`. What is held meanwhile is `a`'s logits of one
    window, `window` x vocabulary x 4 bytes on `a`'s device (263 MB for 512 tokens of Llama 3), and at most 64 MiB of `b`'s.
    `progress` is called with the windows done and those in all. Raises RequestError where the vocabularies differ, or the two
    tokenizers encode the text differently; PaddockError where logits are not finite.
    """
    for llm in (a, b):
        check_window(window, llm.max_model_len, limit=limit)
    most = None if limit is None else limit * window
    cut = windows(_same_ids(a, b, text_or_ids, most), window, limit=limit)
    sums = _Sums()
    for done, ids in enumerate(cut, 1):
        _compare_window(a, b, ids, sums)
        if progress is not None:
            progress(done, len(cut))
    tokens = len(sums.kl)
    found = Comparison(
        tokens=tokens,
        windows=len(cut),
        kl=math.fsum(sums.kl) / tokens,
        kl_max=max(sums.kl),
        top1=math.fsum(sums.same) / tokens,
        nats_a=-math.fsum(sums.logprobs_a) / tokens,
        nats_b=-math.fsum(sums.logprobs_b) / tokens,
    )
    if not all(math.isfinite(value) for value in (found.kl, found.nats_a, found.nats_b)):
        raise PaddockError(
            f"KL is {found.kl}, nats a token {found.nats_a} and {found.nats_b}: logits are not finite", fix="try another dtype"
        )
    return found


def _compare_window(a: LLM, b: LLM, ids: list[int], sums: _Sums) -> None:
    from paddock.evaluation.divergence import Against, Reference  # imports torch, which the LLMs have by now

    reference = Reference(len(ids) - 1)
    with a.watching_prompts(reference.watch):
        ((_, logprobs_a),) = scored(a, [ids])
    against = Against.of(reference)
    with b.watching_prompts(against.watch):
        ((_, logprobs_b),) = scored(b, [ids])
    sums.kl += against.kl_T.tolist()
    sums.same += against.same_T.tolist()
    sums.logprobs_a += logprobs_a
    sums.logprobs_b += logprobs_b


def _same_ids(a: LLM, b: LLM, text_or_ids: TextOrIds, most: int | None) -> list[int]:
    fix = "compare models with one vocabulary, such as a model and a quantised copy of it"
    if a.vocab_size != b.vocab_size:
        raise RequestError(f"the vocabularies differ: {a.vocab_size} tokens in A, {b.vocab_size} in B", fix=fix)
    ids = token_ids(a, text_or_ids, most=most)
    if b.tokenizer is None or not isinstance(text_or_ids, str):
        return ids
    others = token_ids(b, text_or_ids, most=most)
    if ids != others:
        pairs = enumerate(zip(ids, others, strict=False))
        at = next((i for i, (left, right) in pairs if left != right), min(len(ids), len(others)))
        raise RequestError(f"the vocabularies differ: A and B encode the text differently from token {at} on", fix=fix)
    return ids
