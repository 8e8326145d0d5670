"""What a user sets: engine options and environment variables, each checked once and frozen. `auto` is resolved by planning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import Attribute, field, fields_dict, frozen

from paddock.errors import OptionError, did_you_mean

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
DUMMY = "dummy"  # the load format of random weights
LOAD_FORMATS = ("auto", "safetensors", DUMMY)
AUTO = "auto"  # left to planning
# Products with 4-bit weights: inputs as they are, or rounded to FP8 a token, or the weights of large steps rounded to FP8 too.
W4A16, W4A8, W8A8 = "w4a16", "w4a8", "w8a8"
INT4_COMPUTES = (AUTO, W4A16, W4A8, W8A8)
PLAIN_ATTENTION, FP8_ATTENTION = "plain", "fp8"  # products of attention: in the dtype of activations, or in FP8
ATTENTION_COMPUTES = (PLAIN_ATTENTION, FP8_ATTENTION)
EXACT_SUMS, FAST_SUMS = "exact", "fast"  # sums of FP8 products: in float32 each 128 inputs, or the matrix unit's own
FP8_ACCUMULATIONS = (EXACT_SUMS, FAST_SUMS)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8")


def _one_of(allowed: tuple[str, ...]) -> Any:
    def validate(_: object, attribute: Attribute[Any], value: object) -> None:
        if value not in allowed:
            raise OptionError(f"{attribute.name} is {value!r}", fix=did_you_mean(str(value), allowed))

    return validate


def _at_least(low: float, *, optional: bool = False, whole: bool = True) -> Any:
    def validate(_: object, attribute: Attribute[Any], value: object) -> None:
        if optional and value is None:
            return
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= low:
            raise OptionError(f"{attribute.name} is {value!r}", fix=f"give a {'whole ' if whole else ''}number, at least {low}")

    return validate


def _share(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise OptionError(f"{attribute.name} is {value!r}", fix="give a share of the memory above 0, at most 1")


def _pairs(value: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(value.items() if isinstance(value, Mapping) else value))


@frozen(kw_only=True)
class EngineConfig:
    """Everything a user can set about an engine. Names follow vLLM's where one exists.

    `prefer` resolves a name two plugins own (`{"LlamaForCausalLM": "my-plugin"}`); `ops` picks the plugin that implements an
    op; `int4_compute` says whether products with 4-bit weights take inputs as they are or round each token to FP8, and perhaps
    the weights of large steps, which `keep_fp8_weights` keeps beside the 4-bit ones; `attention_compute` whether attention over
    FP8 pages multiplies in the dtype of activations or in FP8; `fp8_accumulation` whether sums of large FP8 products are exact,
    or the matrix unit's own, which keep fewer bits and are quicker; `ignore_config_keys` lets config.json keys pass that the
    model plugin does not know. Memory is in bytes. None, like `auto`, leaves the choice to planning.
    Raises OptionError for a value out of range.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = field(default="auto", validator=_one_of(DTYPES))
    device: str = field(default="auto", validator=_one_of(DEVICES))
    load_format: str = field(default="auto", validator=_one_of(LOAD_FORMATS))
    quantization: str = "auto"
    kv_cache_dtype: str = field(default="auto", validator=_one_of(KV_CACHE_DTYPES))
    int4_compute: str = field(default=AUTO, validator=_one_of(INT4_COMPUTES))
    keep_fp8_weights: bool = False
    attention_compute: str = field(default=PLAIN_ATTENTION, validator=_one_of(ATTENTION_COMPUTES))
    fp8_accumulation: str = field(default=EXACT_SUMS, validator=_one_of(FP8_ACCUMULATIONS))
    attention_backend: str = "auto"
    max_model_len: int | None = field(default=None, validator=_at_least(1, optional=True))
    max_num_seqs: int | None = field(default=None, validator=_at_least(1, optional=True))
    max_num_batched_tokens: int | None = field(default=None, validator=_at_least(1, optional=True))
    max_queue: int = field(default=65536, validator=_at_least(1))
    block_size: int | None = field(default=None, validator=_at_least(1, optional=True))
    gpu_memory_utilization: float = field(default=0.92, validator=_share)
    kv_cache_memory_bytes: int | None = field(default=None, validator=_at_least(1, optional=True))
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    tensor_parallel_size: int | None = field(default=None, validator=_at_least(1, optional=True))
    pipeline_parallel_size: int | None = field(default=None, validator=_at_least(1, optional=True))
    seed: int = field(default=0, validator=_at_least(0))
    observers: tuple[str, ...] = field(default=(), converter=tuple)
    prefer: tuple[tuple[str, str], ...] = field(default=(), converter=_pairs)
    ops: tuple[tuple[str, str], ...] = field(default=(), converter=_pairs)
    ignore_config_keys: tuple[str, ...] = field(default=(), converter=tuple)
    strict: bool = False

    @classmethod
    def from_options(cls, model: str, **options: Any) -> EngineConfig:
        """Return the config, or raise OptionError naming the nearest known option for an unknown one."""
        for name in options:
            if name not in fields_dict(cls):
                raise OptionError(f"unknown option {name!r}", fix=did_you_mean(name, fields_dict(cls)))
        return cls(model=model, **options)


@frozen(kw_only=True)
class Environment:
    """The `PADDOCK_*` variables. `plugins` is None for all installed plugins, else the names of those that may load."""

    plugins: tuple[str, ...] | None = None
    strict: bool = False
    log_level: str = "warning"


_LOG_LEVELS = ("debug", "info", "warning", "error")
VARIABLES = {
    "PADDOCK_PLUGINS": "plugins that may load, by plugin or distribution name, comma separated; unset: all; empty: none",
    "PADDOCK_STRICT": "1: a broken plugin or a warning in the plan is an error",
    "PADDOCK_LOG": f"log level, one of {', '.join(_LOG_LEVELS)}",
}


def read_environment(environ: Mapping[str, str] = os.environ) -> Environment:
    """Return the checked `PADDOCK_*` variables; raise OptionError for an unknown variable or value."""
    for name in environ:
        if name.startswith("PADDOCK_") and name not in VARIABLES:
            raise OptionError(f"unknown environment variable {name}", fix=did_you_mean(name, VARIABLES))
    plugins, strict = environ.get("PADDOCK_PLUGINS"), environ.get("PADDOCK_STRICT", "0")
    level = environ.get("PADDOCK_LOG", "warning").lower()
    if strict not in ("0", "1"):
        raise OptionError(f"PADDOCK_STRICT is {strict!r}", fix="set it to 0 or 1")
    if level not in _LOG_LEVELS:
        raise OptionError(f"PADDOCK_LOG is {level!r}", fix=did_you_mean(level, _LOG_LEVELS))
    names = None if plugins is None else tuple(name.strip() for name in plugins.split(",") if name.strip())
    return Environment(plugins=names, strict=strict == "1", log_level=level)
