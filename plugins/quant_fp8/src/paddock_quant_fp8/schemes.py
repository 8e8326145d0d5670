"""How FP8 checkpoints store their linears: what one weight scale covers, how activations are scaled, what stays plain.

Free of torch. Scales multiply: real = stored * scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from paddock import module_lists
from paddock.axes import FP8_STATIC, FP8_TOKEN, PLAIN, VOCAB, Linear, Tensor, TensorAxis, left_plain
from paddock.errors import PlanError
from paddock_quant_fp8 import names

E4M3 = "float8_e4m3fn"
DEFAULT_ACTIVATION_BOUND = 1200.0  # transformers' FbgemmFp8Config
TENSOR, ROW, BLOCK = "tensor", "row", "block"

_OUT, _IN, _ONE = TensorAxis("out"), TensorAxis("in"), TensorAxis("in", group=-1)
_WEIGHT = Tensor("weight", E4M3, (_OUT, _IN))


@frozen(kw_only=True)
class Stored:
    """How one linear is stored and fed.

    `scales`: a weight scale covers a `tensor`, a `row` of it, or a `block` of (outs, ins). `input_format` is what producers may
    hand over: FP8 with a stored or a token's scale, clipped at `input_bound`; or plain. A plain input is quantised with one scale
    a token and `group` of inputs, or not at all where `group` is 0. `scale_name` is the scale's suffix in the checkpoint.
    """

    scales: str
    input_format: str
    input_bound: float | None = None
    block: tuple[int, int] = (128, 128)
    group: int = 0
    scale_name: str = "weight_scale"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that hold the linear: the weight, its scale and, when static, its input's scale."""
        outs, ins = self.block
        axes = {TENSOR: (), ROW: (_OUT, _ONE), BLOCK: (TensorAxis("out", group=outs), TensorAxis("in", group=ins))}
        static = (Tensor("input_scale", "float32"),) if self.input_format == FP8_STATIC else ()
        return (_WEIGHT, Tensor(self.scale_name, "float32", axes[self.scales]), *static)

    def __str__(self) -> str:
        """Return it in words, for errors."""
        inputs = {FP8_STATIC: "inputs with a stored scale", FP8_TOKEN: "inputs scaled per token"}
        plain = f"inputs scaled per token and {self.group}" if self.group else "plain inputs"
        return f"FP8 with a scale a {self.scales}, {inputs.get(self.input_format, plain)}"


class Fp8Scheme(Protocol):
    """What every `detect` of this plugin returns: an `axes.Scheme` that says how each linear is stored and fed."""

    @property
    def name(self) -> str:
        """Return the format's name."""

    @property
    def dtype(self) -> str:
        """Return the dtype of activations and of plain linears."""

    @property
    def kv_cache_dtype(self) -> str | None:
        """Return `fp8` where the checkpoint is made for FP8 KV."""

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return how `linear`, whose first part is at checkpoint prefix `path`, is stored; None for plainly."""

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the tensors that hold it."""


@frozen(kw_only=True)
class RowwiseFp8:
    """Checkpoints with `fbgemm_fp8`. Activations beyond `activation_bound` are clipped; `skipped` names plain modules."""

    dtype: str
    activation_bound: float = DEFAULT_ACTIVATION_BOUND
    skipped: tuple[str, ...] = ()
    name: str = "fbgemm_fp8"
    kv_cache_dtype: str | None = None
    input_format: str = FP8_TOKEN

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return a scale a row; None for a skipped linear and for the head."""
        if is_head(linear) or left_plain(path, linear, lambda part: names.in_fbgemm(self.skipped, part)):
            return None
        return Stored(scales=ROW, input_format=FP8_TOKEN, input_bound=self.activation_bound)

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return an FP8 weight with a scale a row, or the plain weight of a skipped linear and of the head."""
        return tensors_of(self.stored(path, linear), self.dtype)


@frozen(kw_only=True)
class TensorwiseFp8:
    """Checkpoints with `fp8` as AutoFP8 writes them. `input_format` says static or dynamic; `skipped` names plain modules.

    Where `block` is given, one weight scale covers that many (outs, ins), and activations are scaled per token and `ins` inputs.
    """

    dtype: str
    input_format: str
    skipped: tuple[str, ...] = ()
    name: str = "fp8"
    kv_cache_dtype: str | None = None
    block: tuple[int, int] | None = None

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return a scale a linear or a block; None for a skipped linear and for the head."""
        if is_head(linear) or left_plain(path, linear, lambda part: names.in_paths(self.skipped, part)):
            return None
        if self.block is None:
            return Stored(scales=TENSOR, input_format=self.input_format)
        return Stored(scales=BLOCK, input_format=PLAIN, block=self.block, group=self.block[1], scale_name="weight_scale_inv")

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return an FP8 weight with scales of its parts or blocks, or the plain weight of a skipped linear and of the head."""
        return tensors_of(self.stored(path, linear), self.dtype)


@frozen(kw_only=True)
class ModelOptFp8:
    """Checkpoints NVIDIA's ModelOpt exports: every linear is `how`, but for the modules in `skipped`.

    The head is one of those linears where it `quantises_head`, else plain whatever is skipped.
    """

    dtype: str
    how: Stored
    skipped: tuple[str, ...] = ()
    quantises_head: bool = False
    name: str = "modelopt"
    kv_cache_dtype: str | None = None

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return `how`; None for a skipped linear, and for a head that is not quantised."""
        if is_head(linear) and not self.quantises_head:
            return None
        return None if left_plain(path, linear, lambda part: module_lists.in_modelopt(self.skipped, part)) else self.how

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the tensors that hold the linear."""
        return tensors_of(self.stored(path, linear), self.dtype)


@frozen(kw_only=True)
class ModelOptKv:
    """Checkpoints of ModelOpt whose weights are all plain: only keys and values have scales, those of FP8."""

    dtype: str
    name: str = "modelopt-kv"
    kv_cache_dtype: str | None = "fp8"

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return None: the linear is plain."""
        return None

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the plain weight."""
        return tensors_of(None, self.dtype)


@frozen(kw_only=True)
class Group:
    """Linears that compressed-tensors stores alike: `targets` are paths, patterns `re:...` and classes."""

    targets: tuple[str, ...]
    how: Stored


@frozen(kw_only=True)
class CompressedFp8:
    """Checkpoints of compressed-tensors. The group whose target names a linear most closely says how it is stored."""

    dtype: str
    groups: tuple[Group, ...]
    skipped: tuple[str, ...] = ()
    name: str = "compressed-tensors"
    kv_cache_dtype: str | None = None

    def stored(self, path: str, linear: Linear) -> Stored | None:
        """Return how its group is stored; None where it is ignored or in no group."""
        head = is_head(linear)
        if left_plain(path, linear, lambda part: self._how(part, head) is None):
            return None
        return stored_alike(path, linear, lambda part: self._how(part, head))

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the tensors that hold the linear."""
        return tensors_of(self.stored(path, linear), self.dtype)

    def _how(self, path: str, head: bool) -> Stored | None:
        if module_lists.in_compressed(self.skipped, path, head=head):
            return None
        ranked = [
            (rank, target, group.how)
            for group in self.groups
            for target in group.targets
            if (rank := module_lists.compressed_rank(target, path, head=head)) is not None
        ]
        return min(ranked, key=lambda found: found[:2])[2] if ranked else None


def is_head(linear: Linear) -> bool:
    """Return whether it is the projection to the vocabulary."""
    return linear.out[0].axis == VOCAB


def tensors_of(stored: Stored | None, dtype: str) -> tuple[Tensor, ...]:
    """Return the tensors of a linear stored so; None is one plain weight."""
    return (Tensor("weight", dtype, (_OUT, _IN)),) if stored is None else stored.tensors


def stored_alike(path: str, linear: Linear, how: Callable[[str], Stored | None]) -> Stored | None:
    """Return how all parts of `linear` are stored; raise PlanError, naming two, where they differ but run as one product."""
    scope = path.removesuffix(linear.out[0].source)
    found = {scope + part.source: how(scope + part.source) for part in linear.out}
    other = next((part for part, stored in found.items() if stored != found[path]), None)
    if other is not None:
        raise PlanError(
            f"the checkpoint stores {path} as {found[path]} and {other} as {found[other]}, which run as one product",
            fix="give both the same scheme when making the checkpoint",
        )
    return found[path]
