"""What plugins say: frozen descriptors that hooks return.

A descriptor is data. Anything heavy is a reference, `"package.module:attribute"`, resolved by `resolve` only in the process
that needs it; a module a descriptor's *light* references name (`parse_config`, `weights`, `attention`, `detect`) must import
without torch, because planning calls them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import Attribute, field, frozen

from paddock.errors import PluginError

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")


def _reference(_: object, attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not _REFERENCE.match(value):
        raise PluginError(f"{attribute.name} is {value!r}", fix='write a reference as "package.module:attribute"')


def _optional_reference(instance: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None:
        _reference(instance, attribute, value)


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def _name_set(values: Iterable[str]) -> frozenset[str]:
    return frozenset(values)


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
    except (ImportError, AttributeError) as error:
        raise PluginError(f"cannot resolve {reference!r}: {error}", fix="reinstall the plugin that declares it") from error
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

    name: str
    architectures: tuple[str, ...] = field(converter=_names)
    parse_config: str = field(validator=_reference)
    weights: str = field(validator=_reference)
    attention: str = field(validator=_reference)
    build: str = field(validator=_reference)
    layer_cost: str | None = field(default=None, validator=_optional_reference)
    summary: str = ""


@frozen(kw_only=True)
class QuantizationSpec:
    """A quantised checkpoint format.

    `detect`: light; `CheckpointFacts` to an `axes.Scheme`, or None when the checkpoint is not of this format.
    `method`: heavy; (scheme, checkpoint path, `axes.Linear`) to a `layers.LinearMethod` for that linear.
    `recipe`: heavy; calibration recipe that makes such a checkpoint, or None.
    """

    name: str
    detect: str = field(validator=_reference)
    method: str = field(validator=_reference)
    devices: frozenset[str] = field(default=frozenset({"cpu", "cuda"}), converter=_name_set)
    min_compute_capability: tuple[int, int] | None = None
    dtypes: frozenset[str] = field(default=frozenset({"bfloat16", "float16", "float32"}), converter=_name_set)
    kv_cache_dtypes: frozenset[str] = field(default=frozenset(), converter=_name_set)
    recipe: str | None = field(default=None, validator=_optional_reference)
    summary: str = ""


@frozen(kw_only=True)
class CheckpointFacts:
    """What the small JSON files of a model folder say about its quantisation, by file name, parsed.

    `dtype` is what planning chose for activations and for every linear a format leaves plain.
    """

    config: Mapping[str, Any]
    dtype: str
    files: Mapping[str, Mapping[str, Any]] = field(factory=dict)


@frozen(kw_only=True)
class AttentionSpec:
    """An attention backend's capabilities, as data. `head_dims` empty means any; `page_sizes` is in order of preference.

    `workspace`: light; (AttentionNeeds, max_num_batched_tokens, max_num_seqs) to bytes, or None for none.
    `factory`: heavy; called as `factory(needs, device)`, returns a `layers.AttentionBackend`.
    Higher `rank` wins among backends that serve.
    """

    name: str
    factory: str = field(validator=_reference)
    devices: frozenset[str] = field(converter=_name_set)
    dtypes: frozenset[str] = field(converter=_name_set)
    kv_cache_dtypes: frozenset[str] = field(converter=_name_set)
    page_sizes: tuple[int, ...] = field(converter=_sizes)
    head_dims: frozenset[int] = field(default=frozenset(), converter=_size_set)
    features: frozenset[str] = field(default=frozenset(), converter=_name_set)
    min_compute_capability: tuple[int, int] | None = None
    graph_capturable: bool = False
    workspace: str | None = field(default=None, validator=_optional_reference)
    rank: int = 0
    summary: str = ""


@frozen(kw_only=True)
class ParallelSpec:
    """A way to spread a model over GPUs: the option that sizes it (`tp`, `pp`) and the named axes it cuts.

    `communicator`: heavy; makes the communicator. `nesting`: lower is outermost (pipeline 0, tensor 1).
    """

    name: str
    axis: str
    cuts: frozenset[str] = field(converter=_name_set)
    communicator: str = field(validator=_reference)
    runner: str = field(validator=_reference)
    nesting: int = 0
    max_size: int | None = None
    summary: str = ""


@frozen(kw_only=True)
class OpSpec:
    """An implementation of an op the core defines in `layers.ops`, of the same signature. Higher `rank` wins where it serves."""

    op: str
    implementation: str = field(validator=_reference)
    devices: frozenset[str] = field(converter=_name_set)
    dtypes: frozenset[str] = field(default=frozenset({"bfloat16", "float16", "float32"}), converter=_name_set)
    min_compute_capability: tuple[int, int] | None = None
    rank: int = 0
    summary: str = ""


@frozen(kw_only=True)
class CommandSpec:
    """A CLI command: `command` is a reference to a click command, loaded when it runs; `help` is its one-line summary."""

    name: str
    command: str = field(validator=_reference)
    help: str


@frozen(kw_only=True)
class ObserverSpec:
    """`factory(plan)` returns a callable taking `execution.StepStats`, called at most once a step, when the plan names it."""

    name: str
    factory: str = field(validator=_reference)
    summary: str = ""


@frozen(kw_only=True)
class Issue:
    """Something a plan check found: `level` is `error`, `warning` or `info`; `fix` the way out."""

    level: str
    code: str
    message: str
    fix: str = ""
