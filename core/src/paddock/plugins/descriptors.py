"""What plugins say: frozen descriptors that hooks return.

A descriptor is data. Anything heavy is a reference, `"package.module:attribute"`, resolved by `resolve` only in the process
that needs it; a module a descriptor's *light* references name (`parse_config`, `weights`, `attention`, `detect`) must import
without torch, because planning calls them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from attrs import Attribute, field, frozen

from paddock.config import ATTENTION_COMPUTES, AUTO, DEVICES, DTYPES, KV_CACHE_DTYPES, PLAIN_ATTENTION
from paddock.errors import PluginError, did_you_mean

LEVELS = ("error", "warning", "info")
# Those of `paddock quantize` that not every recipe reads.
RECIPE_OPTIONS = ("format", "group_size", "scheme", "tp_compatible", "zero_points")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")


def _reference(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not _REFERENCE.match(value):
        raise PluginError(f"{attribute.name} is {value!r}", fix='write a reference as "package.module:attribute"')


def _optional_reference(instance: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None:
        _reference(instance, attribute, value)


def _name(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise PluginError(f"{attribute.name} is {value!r}", fix="give it a name")


def _some(_: object, attribute: Attribute[Any], value: Sized) -> None:
    if not value:
        raise PluginError(f"{attribute.name} is empty", fix="name at least one")


def _level(_: object, attribute: Attribute[Any], value: object) -> None:
    if value not in LEVELS:
        raise PluginError(f"{attribute.name} is {value!r}", fix=f"one of {', '.join(LEVELS)}")


def _text(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, str):
        raise PluginError(f"{attribute.name} is {value!r}", fix="write a text")


def _whole(_: object, attribute: Attribute[Any], value: object) -> None:
    if not _is_whole(value):
        raise PluginError(f"{attribute.name} is {value!r}", fix="give a whole number")


def _optional_size(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None:
        _all_positive(_, attribute, (value,))


def _all_positive(_: object, attribute: Attribute[Any], values: Iterable[object]) -> None:
    for value in values:
        if not (isinstance(value, int) and _is_whole(value) and value > 0):
            raise PluginError(f"{attribute.name} holds {value!r}", fix="give whole numbers above 0")


def _some_sizes(instance: object, attribute: Attribute[Any], values: Sized) -> None:
    _some(instance, attribute, values)
    _all_positive(instance, attribute, values)  # type: ignore[arg-type]


def _capability(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, tuple) and len(value) == 2 and all(map(_is_whole, value))):
        raise PluginError(f"{attribute.name} is {value!r}", fix="write it as (major, minor), such as (9, 0)")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _known(*known: str) -> Any:
    def validate(_: object, attribute: Attribute[Any], values: Iterable[str]) -> None:
        for value in sorted(values):
            if value not in known:
                raise PluginError(f"{attribute.name} holds {value!r}", fix=did_you_mean(value, known))

    return validate


_device = _known(*(device for device in DEVICES if device != AUTO))
_dtype = _known(*(dtype for dtype in DTYPES if dtype != AUTO))
_kv_dtype = _known(*(dtype for dtype in KV_CACHE_DTYPES if dtype != AUTO))


def _names(values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):  # which is an iterable of letters
        raise PluginError(f"{values!r} stands where several names are meant", fix=f"write ({values!r},)")
    names = tuple(values)
    for name in names:
        if not isinstance(name, str) or not name:
            raise PluginError(f"{name!r} stands where a name is meant", fix="give names, as strings")
    return names


def _modules(_: object, attribute: Attribute[Any], names: Iterable[str]) -> None:
    for name in names:
        if not name.isidentifier():  # one with a dot could not be looked for without importing what is before it
            raise PluginError(f"{attribute.name} holds {name!r}", fix="name packages as they are imported, such as 'triton'")


def _name_set(values: Iterable[str]) -> frozenset[str]:
    return frozenset(_names(values))


def _sizes(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


def _size_set(values: Iterable[int]) -> frozenset[int]:
    return frozenset(values)


def resolve(reference: str) -> Any:
    """Return the object a reference names; raise PluginError, with the reason, when it cannot be imported."""
    module, _, attribute = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:  # importing runs the plugin's code, which may raise anything
        what = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"cannot resolve {reference!r}: {what}", fix="repair or reinstall the plugin that declares it"
        ) from error
    return found


@frozen(kw_only=True)
class AttentionNeeds:
    """What a model asks of an attention backend. `features` are names such as `alibi`, `sliding_window`, `softcap`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    features: frozenset[str] = frozenset()


@frozen(kw_only=True)
class ModelSpec:
    """A model family.

    `parse_config`: light; (config.json as dict, ignored keys) to a frozen config with `num_layers`, `vocab_size`,
    `max_model_len`, `eos_token_ids` and `dtype`; an unknown key or unsupported value raises ModelConfigError.
    `weights`: light; config to `axes.WeightTable`. `attention`: light; config to `AttentionNeeds`.
    `build`: heavy; (config, `layers.Builder`) to a `layers.Model`.
    `layer_cost`: light; (config, layer index) to a relative cost, for pipeline cuts; None means all layers cost the same.
    """

    name: str = field(validator=_name)
    architectures: tuple[str, ...] = field(converter=_names, validator=_some)
    parse_config: str = field(validator=_reference)
    weights: str = field(validator=_reference)
    attention: str = field(validator=_reference)
    build: str = field(validator=_reference)
    layer_cost: str | None = field(default=None, validator=_optional_reference)
    summary: str = field(default="", validator=_text)


@frozen(kw_only=True)
class QuantizationSpec:
    """A quantised checkpoint format.

    `detect`: light; `CheckpointFacts` to an `axes.Scheme`, or None when the checkpoint is not of this format.
    `method`: heavy; (scheme, checkpoint path, `axes.Linear`) to a `layers.LinearMethod` for that linear.
    `online`: light; `CheckpointFacts` of a plain checkpoint to the `axes.Scheme` it is kept in when this format is asked for by
    name, its linears quantised while they are read; their methods then have `quantise_rows`. None where the format cannot.
    """

    name: str = field(validator=_name)
    detect: str = field(validator=_reference)
    method: str = field(validator=_reference)
    devices: frozenset[str] = field(default=frozenset({"cpu", "cuda"}), converter=_name_set, validator=_device)
    min_compute_capability: tuple[int, int] | None = field(default=None, validator=_capability)
    dtypes: frozenset[str] = field(default=frozenset({"bfloat16", "float16", "float32"}), converter=_name_set, validator=_dtype)
    kv_cache_dtypes: frozenset[str] = field(default=frozenset(), converter=_name_set, validator=_kv_dtype)
    online: str | None = field(default=None, validator=_optional_reference)
    summary: str = field(default="", validator=_text)


@frozen(kw_only=True)
class RecipeSpec:
    """A way to make a quantised checkpoint of a plain one: what `paddock quantize --recipe NAME` runs.

    `create`: heavy; `quantize.recipe.RecipeInputs` to a `quantize.recipe.Recipe`; raises OptionError for an unsuitable model.
    `kv_cache_dtypes` are those it can find KV scales for, `options` those of `RECIPE_OPTIONS` that it reads.
    """

    name: str = field(validator=_name)
    create: str = field(validator=_reference)
    options: frozenset[str] = field(default=frozenset(), converter=_name_set, validator=_known(*RECIPE_OPTIONS))
    kv_cache_dtypes: frozenset[str] = field(default=frozenset(), converter=_name_set, validator=_kv_dtype)
    summary: str = field(default="", validator=_text)


@frozen(kw_only=True)
class CheckpointFacts:
    """What the small JSON files of a model folder say about its quantisation, by file name, parsed.

    `dtype` is what planning chose for activations and for every linear a format leaves plain. `ignored_keys` are those the user
    lets pass (option `ignore_config_keys`), in full: `quantization_config.novelty`.
    """

    config: Mapping[str, Any]
    dtype: str
    files: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    ignored_keys: tuple[str, ...] = ()


@frozen(kw_only=True)
class AttentionSpec:
    """An attention backend's capabilities, as data. `head_dims` empty means any; `page_sizes` is in order of preference.

    `computes`: what it multiplies in, `plain` (the dtype of activations) or `fp8` (FP8 pages with `AttentionParams.in_fp8`).
    `workspace`: light; (AttentionNeeds, max_num_batched_tokens, max_num_seqs) to bytes, or None for none.
    `factory`: heavy; called as `factory(needs, device)`, returns a `layers.AttentionBackend`.
    `requires` names packages to import that may be missing: planning looks for them, and imports none.
    `compile_ahead`: heavy; called as `compile_ahead(device)` before the weights are read, returns a context manager; None where
    nothing is compiled at run time. Inside it no kernel of the plugin's is launched: those that would have been are compiled.
    Higher `rank` wins among backends that serve.
    """

    name: str = field(validator=_name)
    factory: str = field(validator=_reference)
    devices: frozenset[str] = field(converter=_name_set, validator=[_some, _device])
    dtypes: frozenset[str] = field(converter=_name_set, validator=[_some, _dtype])
    kv_cache_dtypes: frozenset[str] = field(converter=_name_set, validator=[_some, _kv_dtype])
    page_sizes: tuple[int, ...] = field(converter=_sizes, validator=_some_sizes)
    head_dims: frozenset[int] = field(default=frozenset(), converter=_size_set, validator=_all_positive)
    features: frozenset[str] = field(default=frozenset(), converter=_name_set)
    computes: frozenset[str] = field(
        default=frozenset({PLAIN_ATTENTION}), converter=_name_set, validator=[_some, _known(*ATTENTION_COMPUTES)]
    )
    min_compute_capability: tuple[int, int] | None = field(default=None, validator=_capability)
    requires: tuple[str, ...] = field(default=(), converter=_names, validator=_modules)
    graph_capturable: bool = False
    workspace: str | None = field(default=None, validator=_optional_reference)
    compile_ahead: str | None = field(default=None, validator=_optional_reference)
    rank: int = field(default=0, validator=_whole)
    summary: str = field(default="", validator=_text)


@frozen(kw_only=True)
class ParallelSpec:
    """A way to spread a model over GPUs: the option that sizes it (`tp`, `pp`) and the named axes it cuts.

    `communicator`: heavy; makes the communicator. `nesting`: lower is outermost (pipeline 0, tensor 1).
    """

    name: str = field(validator=_name)
    axis: str = field(validator=_name)
    cuts: frozenset[str] = field(converter=_name_set)
    communicator: str = field(validator=_reference)
    runner: str = field(validator=_reference)
    nesting: int = field(default=0, validator=_whole)
    max_size: int | None = field(default=None, validator=_optional_size)
    summary: str = field(default="", validator=_text)


@frozen(kw_only=True)
class OpSpec:
    """An implementation of an op the core defines in `layers.ops`, of the same signature. Higher `rank` wins where it serves.

    `requires` names packages to import that may be missing: planning looks for them, and imports none. `compile_ahead` is as an
    attention backend's; it is entered once, however many of a plugin's ops name it. `groups` is for ops over 4-bit weights: how
    many inputs share a scale in the weights its kernels are for, and so may multiples of the largest; empty for any. Weights in
    other groups it computes in plain torch, of which planning warns.
    """

    op: str = field(validator=_name)
    implementation: str = field(validator=_reference)
    devices: frozenset[str] = field(converter=_name_set, validator=[_some, _device])
    dtypes: frozenset[str] = field(default=frozenset({"bfloat16", "float16", "float32"}), converter=_name_set, validator=_dtype)
    min_compute_capability: tuple[int, int] | None = field(default=None, validator=_capability)
    requires: tuple[str, ...] = field(default=(), converter=_names, validator=_modules)
    groups: frozenset[int] = field(default=frozenset(), converter=_size_set, validator=_all_positive)
    compile_ahead: str | None = field(default=None, validator=_optional_reference)
    rank: int = field(default=0, validator=_whole)
    summary: str = field(default="", validator=_text)

    def serves_groups_of(self, size: int) -> bool:
        """Return whether its kernels are for weights of which `size` inputs share a scale."""
        return not self.groups or size in self.groups or size % max(self.groups) == 0


@frozen(kw_only=True)
class CommandSpec:
    """A CLI command: `command` is a reference to a click command, loaded when it runs; `help` is its one-line summary."""

    name: str = field(validator=_name)
    command: str = field(validator=_reference)
    help: str = field(validator=_text)


@frozen(kw_only=True)
class ObserverSpec:
    """`factory(plan)` returns a callable taking `execution.stats.StepStats`; called at most once a step if the plan names it."""

    name: str = field(validator=_name)
    factory: str = field(validator=_reference)
    summary: str = field(default="", validator=_text)


@frozen(kw_only=True)
class Issue:
    """Something a plan check found: `level` is `error`, `warning` or `info`; `fix` the way out."""

    level: str = field(validator=_level)
    code: str = field(validator=_name)
    message: str = field(validator=_text)
    fix: str = field(default="", validator=_text)
