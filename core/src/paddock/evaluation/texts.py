"""A long text in token ids, cut into windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from paddock.errors import RequestError
from paddock.llm import LLM
from paddock.text.beginning import first_ids

TextOrIds = str | Sequence[int]
Progress = Callable[[int, int], None]  # what is done, and of how much


def token_ids(llm: LLM, text_or_ids: TextOrIds, *, most: int | None = None) -> list[int]:
    """Return a text as the model's tokenizer encodes it: a bos token comes first where the tokenizer puts one, ids as given.

    No more than the first `most` are returned, and no more of the text is encoded than they need.

    Raises RequestError for fewer than two tokens, where nothing can be predicted, for a text where no tokenizer is loaded, and
    for bytes, which are neither a text nor ids.
    """
    if isinstance(text_or_ids, (bytes, bytearray, memoryview)):
        raise RequestError(f"the text is {type(text_or_ids).__name__}", fix="decode it, as in text.decode('utf-8')")
    if isinstance(text_or_ids, str):
        if llm.tokenizer is None:
            raise RequestError("a text needs a tokenizer, and none is loaded", fix="give token ids, or load a tokenizer")
        encode = llm.tokenizer.encode
        ids = encode(text_or_ids) if most is None else first_ids(encode, text_or_ids, most)
    else:
        ids = list(text_or_ids)[:most]
    if len(ids) < 2:
        held = f"{text_or_ids!r:.60} has {len(ids)} token{'s' * (len(ids) != 1)}"
        raise RequestError(f"the text {held}, too few to predict one from another", fix="give a text of at least two tokens")
    return ids


def windows(ids: Sequence[int], size: int, *, limit: int | None = None) -> list[list[int]]:
    """Return `ids` cut into windows of `size` that do not overlap, the last one shorter; a last single token is left out.

    `limit` keeps the first so many.
    """
    cut = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    whole = [window for window in cut if len(window) > 1]
    return whole if limit is None else whole[:limit]


def check_window(window: int, max_model_len: int, *, limit: int | None) -> None:
    """Raise RequestError unless windows of `window` tokens fit the model, and `limit` is None or at least 1."""
    if max_model_len <= 2:
        raise RequestError(
            f"max_model_len is {max_model_len}, which leaves no window in which one token is predicted from another",
            fix="raise max_model_len to 3 or more",
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise RequestError(f"window is {window!r}", fix="give a whole number of tokens, at least 2")
    if window >= max_model_len:
        raise RequestError(
            f"window is {window}, which leaves no room in max_model_len {max_model_len}",
            fix=f"give a window of at most {max_model_len - 1} tokens, or raise max_model_len",
        )
    check_limit(limit)


def check_limit(limit: int | None) -> None:
    """Raise RequestError unless `limit` is None or at least 1."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise RequestError(f"limit is {limit!r}", fix="give a whole number, at least 1, or None for all")


def perplexity_of(nats: float) -> float:
    """Return e to the nats a token, infinity where a float holds no such number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
