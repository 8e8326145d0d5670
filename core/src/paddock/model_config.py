"""Reading a model's config.json strictly: typed, bounded, and with nothing left unread. Free of torch.

A model plugin takes every key it understands from a `ConfigReader` and then calls `finish`, which names what is left over.
Integers are bounded here, before anyone multiplies or allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

from paddock.errors import ModelConfigError, did_you_mean

MAX_SIZE = 1 << 22  # widths, vocabulary rows
MAX_LAYERS = 1 << 12
MAX_POSITIONS = 1 << 28

# What Hugging Face tools write and a model's mathematics does not depend on; `auto_map` is never honoured.
# fmt: off
BOOKKEEPING = frozenset({
    "architectures", "model_type", "transformers_version", "use_cache", "initializer_range", "auto_map", "torchscript",
    "return_dict", "output_hidden_states", "output_attentions", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "add_cross_attention",
    "tie_encoder_decoder", "finetuning_task", "id2label", "label2id", "problem_type", "tokenizer_class", "prefix",
    "sep_token_id", "decoder_start_token_id", "bos_token_id", "pad_token_id", "unk_token_id", "task_specific_params",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "transformers.js_config", "quantization_config", "compression_config",
    "unsloth_version", "unsloth_fixed", "gradient_checkpointing",
})
# fmt: on

_DTYPES = ("bfloat16", "float16", "float32")
_ABSENT: Any = object()


class ConfigReader:
    """A config.json being read. A key that is null counts as absent; an absent key without a default is an error.

    `ignored` holds the keys the user lets pass (option `ignore_config_keys`); `harmless` those nobody needs. Names beginning
    with "_" are private to the tool that wrote them. Every error is a ModelConfigError naming key, value and what is allowed.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        ignored: Iterable[str] = (),
        harmless: Iterable[str] = BOOKKEEPING,
        path: str = "",
        file: str = "config.json",
    ) -> None:
        """Read from `raw`; in errors `file` is where it stands and `path` prefixes key names, for sections within sections."""
        self._raw, self._path, self._file = dict(raw), path, file
        self._ignored, self._harmless = frozenset(ignored), frozenset(harmless)
        self._known: set[str] = set()
        self._spelled: dict[str, str] = {}  # name asked for, to the alias the file uses

    def has(self, name: str, *aliases: str) -> bool:
        """Return whether the key is there and not null."""
        return self._take((name, *aliases), required=False) is not _ABSENT

    def integer(self, name: str, *aliases: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._take((name, *aliases), required=default is None)
        if value is _ABSENT:
            assert default is not None
            return default
        whole = not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
        if not whole or not low <= value <= high:
            raise self.wrong(name, value, f"a whole number from {low} to {high}")
        return int(value)

    def number(self, name: str, *aliases: str, default: float | None = None, low: float = 0.0, high: float = math.inf) -> float:
        """Return a finite number from `low` to `high`."""
        value = self.optional_number(name, *aliases, low=low, high=high)
        if value is None:
            value = default if default is not None else self._take((name, *aliases), required=True)
        return float(value)

    def optional_number(self, name: str, *aliases: str, low: float = 0.0, high: float = math.inf) -> float | None:
        """Return a finite number from `low` to `high`, or None when absent."""
        value = self._take((name, *aliases), required=False)
        if value is _ABSENT:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise self.wrong(name, value, f"a finite number, at least {low}" + ("" if math.isinf(high) else f", at most {high}"))
        return float(value)

    def flag(self, name: str, *aliases: str, default: bool) -> bool:
        """Return true or false."""
        value = self._take((name, *aliases), required=False)
        if value is _ABSENT:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, *aliases: str, allowed: Iterable[str], default: str | None = None) -> str:
        """Return one of the `allowed` strings."""
        value, choices = self._take((name, *aliases), required=default is None), tuple(allowed)
        if value is _ABSENT:
            assert default is not None
            return default
        if value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(map(repr, choices))}")
        return str(value)

    def only(self, name: str, *aliases: str, value: Any) -> None:
        """Check that the key is absent or holds the one `value` that is supported."""
        found = self._take((name, *aliases), required=False)
        if found is not _ABSENT and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            raise self.wrong(name, found, f"{value!r}, the only value supported")

    def accept(self, *names: str) -> None:
        """Let keys pass that are known to change nothing."""
        self._known.update(names)

    def token_ids(self, name: str, *aliases: str, default: Iterable[int] = ()) -> tuple[int, ...]:
        """Return token ids given as one number or a list of them, without repetitions."""
        value = self._take((name, *aliases), required=False)
        if value is _ABSENT:
            return tuple(default)
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_SIZE for i in ids):
            raise self.wrong(name, value, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))

    def dtype(self, default: str = "float32") -> str:
        """Return the dtype the weights were saved in, from `dtype` or `torch_dtype`."""
        value = self._take(("dtype", "torch_dtype"), required=False)
        if value is _ABSENT:
            return default
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in _DTYPES:
            raise self.wrong("dtype", value, f"one of {', '.join(_DTYPES)}")
        return str(name)

    def section(self, name: str, *aliases: str) -> ConfigReader | None:
        """Return a reader of a nested object, or None when it is absent or empty; call its `finish` too."""
        value = self._take((name, *aliases), required=False)
        if value is _ABSENT or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        inner = f"{self._path}{self._spelled[name]}."
        return ConfigReader(value, ignored=self._ignored, harmless=(), path=inner, file=self._file)

    def finish(self) -> None:
        """Raise one ModelConfigError for all keys nobody read, with the nearest known key for each."""
        unread = sorted(name for name, value in self._raw.items() if value is not None and not self._passes(name))
        if not unread:
            return
        lines = [f"{self._path}{name} = {self._raw[name]!r:.80}{self._near(name)}" for name in unread[:20]]
        names = ",".join(self._path + name for name in unread)
        raise ModelConfigError(
            f"{self._file} holds {len(unread)} key(s) this model does not know: " + "; ".join(lines),
            fix=f"correct the key, or let it pass with ignore_config_keys={names}",
        )

    def wrong(self, name: str, value: object, allowed: str) -> ModelConfigError:
        """Return the error for a key whose value is not supported, in the file's spelling."""
        name = self._spelled.get(name, name)
        return ModelConfigError(
            f"{self._file}: {self._path}{name} is {value!r:.120}", fix=f"{self._path}{name} must be {allowed}"
        )

    def _near(self, name: str) -> str:
        suggestion = did_you_mean(name, self._known)
        return f" ({suggestion})" if suggestion.startswith("did you mean") else ""

    def _passes(self, name: str) -> bool:
        return name in self._known or name in self._harmless or self._path + name in self._ignored or name.startswith("_")

    def _take(self, names: tuple[str, ...], *, required: bool) -> Any:
        self._known.update(names)
        found = {name: self._raw[name] for name in names if self._raw.get(name) is not None}
        if not found:
            if required:
                raise ModelConfigError(
                    f"{self._file} has no {self._path}{names[0]}", fix=f"add {self._path}{' or '.join(names)} to {self._file}"
                )
            return _ABSENT
        (first, value), *others = found.items()
        self._spelled[names[0]] = first
        for other, duplicate in others:
            if duplicate != value:
                raise ModelConfigError(
                    f"{self._file}: {self._path}{first} is {value!r} but {other} is {duplicate!r}", fix="keep one of the two"
                )
        return value


def eos_token_ids(configured: tuple[int, ...], generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Return the ids that end a text: generation_config.json's where it names any, else those of config.json."""
    return ConfigReader(generation_config or {}, file="generation_config.json").token_ids("eos_token_id") or configured


ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@frozen(kw_only=True)
class RopeSpec:
    """How rotary angles fall with the dimension: kind and its numbers, all resolved. `layers.rope` has the formulas.

    `original_max_position` is the context the unscaled frequencies were trained for; `attention_factor` multiplies cos and sin.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def context(self, max_position_embeddings: int) -> int:
        """Return the longest sequence the frequencies are meant for: the scaled kinds stretch what config.json states."""
        if self.kind in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        if self.kind == "yarn":
            return max(max_position_embeddings, int(self.original_max_position * self.factor))
        return max_position_embeddings


def parse_rope(reader: ConfigReader, *, max_position_embeddings: int, default_theta: float = 10000.0) -> RopeSpec:
    """Return the rotary embedding a config asks for, in either spelling.

    The old one is `rope_theta` beside `rope_scaling` (with `type` or `rope_type`), the new one `rope_parameters` with everything
    in it. Raises ModelConfigError for an unknown type, a missing number or an unknown key.
    """
    outer_theta = reader.optional_number("rope_theta", low=1.0)
    reader.only("partial_rotary_factor", value=1.0)
    scaling = reader.section("rope_parameters", "rope_scaling")
    if scaling is None:
        return RopeSpec(theta=default_theta if outer_theta is None else outer_theta)
    inner_theta = scaling.optional_number("rope_theta", low=1.0)
    if inner_theta is not None and outer_theta is not None and inner_theta != outer_theta:
        raise scaling.wrong("rope_theta", inner_theta, f"the same as the outer rope_theta, {outer_theta}")
    theta = next((t for t in (inner_theta, outer_theta) if t is not None), default_theta)
    scaling.only("partial_rotary_factor", value=1.0)
    kind = scaling.choice("rope_type", "type", allowed=ROPE_KINDS, default="default")
    spec = _SCALINGS[kind](scaling, theta, max_position_embeddings)
    scaling.finish()
    return spec


def _default(scaling: ConfigReader, theta: float, context: int) -> RopeSpec:
    return RopeSpec(theta=theta)


def _linear(scaling: ConfigReader, theta: float, context: int) -> RopeSpec:
    return RopeSpec(theta=theta, kind="linear", factor=scaling.number("factor", low=1.0))


def _dynamic(scaling: ConfigReader, theta: float, context: int) -> RopeSpec:
    scaling.only("original_max_position_embeddings", value=context)
    return RopeSpec(theta=theta, kind="dynamic", factor=scaling.number("factor", low=1.0), original_max_position=context)


def _llama3(scaling: ConfigReader, theta: float, context: int) -> RopeSpec:
    low = scaling.number("low_freq_factor", low=1e-6)
    high = scaling.number("high_freq_factor", low=1e-6)
    if high <= low:
        raise scaling.wrong("high_freq_factor", high, f"above low_freq_factor, {low}")
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=scaling.number("factor", low=1.0),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=scaling.integer("original_max_position_embeddings", default=context, high=MAX_POSITIONS),
    )


def _yarn(scaling: ConfigReader, theta: float, context: int) -> RopeSpec:
    original = scaling.integer("original_max_position_embeddings", default=context, high=MAX_POSITIONS)
    factor = scaling.number("factor", default=max(1.0, context / original), low=1.0)
    mscale, mscale_all = scaling.optional_number("mscale"), scaling.optional_number("mscale_all_dim")
    attention = scaling.optional_number("attention_factor")
    if attention is None and mscale and mscale_all:
        attention = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=_yarn_mscale(factor, 1.0) if attention is None else attention,
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        truncate=scaling.flag("truncate", default=True),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Return the growth of the logits with the context (YaRN paper, arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


_SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
