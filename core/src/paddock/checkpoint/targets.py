"""Where checkpoint tensors go: the meeting point of loading (which reads) and layers (which declare)."""

from __future__ import annotations

from attrs import frozen
from torch import Tensor


@frozen(eq=False, kw_only=True)
class Target:
    """A destination for one checkpoint tensor.

    `view` is filled with the region `region` ((start, stop) an axis) of a checkpoint tensor of shape `shape`, axes of one element
    aside. Float dtypes convert into the view's; others must match. An `optional` tensor may be absent: the view keeps what it
    holds. `aliases` are other names under which savers wrote the same tensor; where several are stored, the first fills it.
    """

    name: str
    view: Tensor
    shape: tuple[int, ...]
    region: tuple[tuple[int, int], ...]
    optional: bool = False
    aliases: tuple[str, ...] = ()
