"""What a user asks for and what comes back: sampling parameters, requests and their outputs. All values, no behaviour."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from attrs import Attribute, define, field, fields_dict, frozen

from paddock.errors import RequestError, did_you_mean

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy, as in vLLM
_LARGEST = 1e30  # of temperature and logit bias: what the sampler makes of them stays finite in float32
_STEEPEST = 1e6  # of the repetition penalty and its inverse, likewise


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{name} is {value!r}", fix=f"give {name} {allowed}")


def _number(low: float, high: float, allowed: str, *, low_open: bool = False) -> Any:
    def validate(_: object, attribute: Attribute[Any], value: object) -> None:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        ok = ok and (low < value if low_open else low <= value) and value <= high  # type: ignore[operator]
        _check(ok, attribute.name, value, allowed)

    return validate


def _whole(low: int, allowed: str, *, optional: bool = False) -> Any:
    def validate(_: object, attribute: Attribute[Any], value: object) -> None:
        if optional and value is None:
            return
        _check(isinstance(value, int) and not isinstance(value, bool) and value >= low, attribute.name, value, allowed)

    return validate


def _flag(_: object, attribute: Attribute[Any], value: object) -> None:
    _check(isinstance(value, bool), attribute.name, value, "True or False")


def _strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    return tuple(value) if isinstance(value, Iterable) else (value,)


def _texts(_: object, attribute: Attribute[Any], value: tuple[object, ...]) -> None:
    allowed = "a text or several, none of them empty"
    _check(all(isinstance(text, str) and text for text in value), attribute.name, value, allowed)


def _token_ids(value: Iterable[int] | None) -> tuple[int, ...]:
    given = () if value is None else value
    try:
        ids = tuple(operator.index(token) for token in given if not isinstance(token, bool))
    except TypeError:
        ids = ()
    _check(
        isinstance(given, Sequence | set | frozenset) and len(ids) == len(given), "stop_token_ids", value, "token ids in a list"
    )
    return ids


def _bias(value: Mapping[int, float] | None) -> tuple[tuple[int, float], ...]:
    try:
        items = tuple(sorted((_id_of(token), float(bias)) for token, bias in dict(value or {}).items()))
    except (TypeError, ValueError, AttributeError):
        raise RequestError(f"logit_bias is {value!r}", fix="give logit_bias a mapping of token id to number") from None
    _check(all(abs(bias) <= _LARGEST for _, bias in items), "logit_bias", value, f"numbers from -{_LARGEST:g} to {_LARGEST:g}")
    return items


def _id_of(token: int | str) -> int:
    """Return a token id, which JSON writes as a text where it is a key."""
    return int(token) if isinstance(token, str) else operator.index(token)


@frozen(kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Names follow vLLM's; every value is checked on creation.

    Logprobs are of the model's own distribution, before temperature, bias, penalties and filters; 0 gives those of the chosen
    tokens alone. Raises RequestError for an unknown option, naming the nearest, and for a value out of range, naming what is
    allowed.
    """

    n: int = field(default=1, validator=_whole(1, "a whole number, at least 1"))
    temperature: float = field(default=1.0, validator=_number(0.0, _LARGEST, f"a number from 0 (greedy) to {_LARGEST:g}"))
    top_k: int = field(default=0)
    top_p: float = field(default=1.0, validator=_number(0.0, 1.0, "a number above 0, at most 1", low_open=True))
    min_p: float = field(default=0.0, validator=_number(0.0, 1.0, "a number from 0 to 1"))
    repetition_penalty: float = field(
        default=1.0, validator=_number(1 / _STEEPEST, _STEEPEST, f"a number from {1 / _STEEPEST:g} to {_STEEPEST:g}, 1 for none")
    )
    presence_penalty: float = field(default=0.0, validator=_number(-2.0, 2.0, "a number from -2 to 2"))
    frequency_penalty: float = field(default=0.0, validator=_number(-2.0, 2.0, "a number from -2 to 2"))
    logit_bias: tuple[tuple[int, float], ...] = field(default=None, converter=_bias)
    bad_words: tuple[str, ...] = field(default=None, converter=_strings, validator=_texts)
    max_tokens: int | None = field(
        default=16, validator=_whole(1, "a whole number, at least 1, or None for no limit", optional=True)
    )
    min_tokens: int = field(default=0, validator=_whole(0, "a whole number, 0 or more"))
    stop: tuple[str, ...] = field(default=None, converter=_strings, validator=_texts)
    stop_token_ids: tuple[int, ...] = field(default=None, converter=_token_ids)
    include_stop_str_in_output: bool = field(default=False, validator=_flag)
    ignore_eos: bool = field(default=False, validator=_flag)
    seed: int | None = field(default=None, validator=_whole(0, "a whole number, 0 or more, or None", optional=True))
    logprobs: int | None = field(default=None, validator=_whole(0, "a whole number, 0 or more, or None", optional=True))
    prompt_logprobs: int | None = field(default=None, validator=_whole(0, "a whole number, 0 or more, or None", optional=True))
    skip_special_tokens: bool = field(default=True, validator=_flag)

    def __new__(cls, **options: Any) -> Self:
        """Return the parameters before they are filled in; an unknown option raises, naming the nearest."""
        known = fields_dict(cls)
        for name in options:
            if name not in known:
                raise RequestError(f"unknown sampling option {name!r}", fix=did_you_mean(name, known))
        return super().__new__(cls)

    @top_k.validator
    def _check_top_k(self, attribute: object, value: object) -> None:
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= -1
        _check(ok, "top_k", value, "a whole number: 0 or -1 for all tokens, else at least 1")

    def __attrs_post_init__(self) -> None:
        """Check what concerns several values at once."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", fix="lower min_tokens or raise max_tokens"
            )

    @property
    def greedy(self) -> bool:
        """Return whether every token is the most likely one."""
        return self.temperature < GREEDY_EPSILON


@frozen(kw_only=True)
class Request:
    """One prompt in token ids with its parameters, as the engine takes it.

    `stop_ids` holds every id that ends it (eos, unless ignored, and stop_token_ids); `bad_words_ids` the token
    spellings of its bad words. Lower `priority` runs earlier.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str = ""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return every token id that ends the request."""
        eos = frozenset[int]() if self.params.ignore_eos else self.eos_ids
        return eos | frozenset(self.params.stop_token_ids)


@frozen
class Logprob:
    """A token's log-probability (natural log) and its rank in the vocabulary (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@frozen(kw_only=True)
class Timings:
    """Seconds on the monotonic clock: when a request arrived, was first scheduled, gave its first token and ended."""

    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Return seconds from arrival to the first token, or None before it."""
        return None if self.first_token is None else self.first_token - self.arrived


@define
class CompletionOutput:
    """One of a request's n continuations. `finish_reason` is `stop`, `length`, `abort` or `error`, None while it runs.

    `stop_reason` is the stop string or token id that ended it; `error` the text of the error that did; `token_times` when
    each token arrived, in seconds on the monotonic clock.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    error: str | None = None
    token_times: list[float] = field(factory=list)


@define
class RequestOutput:
    """A request's prompt and its continuations so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    timings: Timings | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Return the first continuation's text."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Return the first continuation's token ids."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Return why the first continuation ended, or None while it runs."""
        return self.outputs[0].finish_reason
