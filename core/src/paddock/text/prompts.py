"""From what a user gives to a checked Request."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from paddock.errors import RequestError
from paddock.request import Request, SamplingParams
from paddock.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]

_SHAPE_FIX = 'give a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
_NO_TOKENIZER_FIX = "give token ids, or load a model folder with tokenizer.json"


@frozen(kw_only=True)
class EncodedPrompt:
    """A prompt in token ids, and its text where it had one."""

    text: str | None
    token_ids: tuple[int, ...]


@frozen(kw_only=True)
class PromptReader:
    """Turns prompts into requests the engine takes, or raises RequestError saying what is wrong and by how much."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int] = frozenset()

    def encode(self, prompt: Prompt | EncodedPrompt) -> EncodedPrompt:
        """Return the prompt in checked token ids; ids given beside a text are taken as its encoding."""
        if isinstance(prompt, EncodedPrompt):
            return prompt
        text, ids = _parts(prompt)
        if ids is None:
            assert text is not None
            ids = self._need_tokenizer("a text prompt").encode(text)
        if not ids:
            raise RequestError("the prompt is empty", fix="give at least one token")
        self._check_ids(ids, "the prompt")
        if len(ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, which leaves no room in max_model_len {self.max_model_len}",
                fix=f"shorten the prompt to at most {self.max_model_len - 1} tokens, or raise max_model_len",
            )
        return EncodedPrompt(text=text, token_ids=tuple(ids))

    def request(self, request_id: str, prompt: EncodedPrompt, params: SamplingParams, *, priority: int) -> Request:
        """Return the request; raise RequestError where `params` does not fit the model."""
        if params.stop:
            self._need_tokenizer("stop")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        self._check_ids([token for token, _ in params.logit_bias], "logit_bias")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                raise RequestError(
                    f"{name} is {getattr(params, name)}, the model has {self.vocab_size} tokens", fix=f"ask for fewer {name}"
                )
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            params=params,
            eos_ids=self.eos_ids,
            bad_words_ids=self._bad_words(params.bad_words),
            priority=priority,
        )

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each word's spellings, at the start of a text and after a space."""
        if not words:
            return ()
        tokenizer = self._need_tokenizer("bad_words")
        spellings: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, f" {word.lstrip()}"):
                ids = tuple(tokenizer.encode(text, add_special_tokens=False))
                if ids:
                    spellings[ids] = None
        return tuple(spellings)

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        for i, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{where} holds token id {token} at index {i}, outside the vocabulary of {self.vocab_size}",
                    fix=f"give ids from 0 to {self.vocab_size - 1}",
                )

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and none is loaded", fix=_NO_TOKENIZER_FIX)
        return self.tokenizer


def as_list(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Any], bool]:
    """Return the prompts, and whether it was one (a text, a mapping, a run of token ids) rather than a list of them."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    if isinstance(prompts, Sequence):
        single = bool(prompts) and not isinstance(prompts[0], (str, Mapping, Sequence))
        return [prompts] if single else list(prompts), single
    raise RequestError(f"the prompts are {prompts!r:.200}", fix=f"{_SHAPE_FIX}, or a list of these")


def _parts(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """Return a prompt's text and its ids, at least one of them present."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if set(prompt) - {"prompt", "prompt_token_ids"} or not (text is None or isinstance(text, str)):
            raise RequestError(f"the prompt is {prompt!r:.200}", fix=_SHAPE_FIX)
        if text is None and ids is None:
            raise RequestError("the prompt has neither prompt nor prompt_token_ids", fix=_SHAPE_FIX)
        return text, None if ids is None else _whole_numbers(ids)
    return None, _whole_numbers(prompt)


def _whole_numbers(ids: Any) -> list[int]:
    try:
        if any(isinstance(token, bool) for token in ids):
            raise TypeError
        return [operator.index(token) for token in ids]
    except TypeError:
        raise RequestError(f"the prompt is {ids!r:.200}", fix=_SHAPE_FIX) from None
