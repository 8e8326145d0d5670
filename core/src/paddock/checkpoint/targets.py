"""Where checkpoint tensors go: the meeting point of loading (which reads) and layers (which declare)."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen
from torch import Tensor


@frozen(eq=False, kw_only=True)
class RowQuantiser:
    """Quantises the rows of a matrix as they are read, a piece at a time.

    `convert` maps whole rows [R, I], in the dtype and on the device they arrive in, to values of the view's dtype [R, I] and
    scales [R, 1]. `scales` [rows of the region, 1] takes the scales. `dtype` is what the values would be loaded in otherwise.
    """

    convert: Callable[[Tensor], tuple[Tensor, Tensor]]
    scales: Tensor
    dtype: str


@frozen(eq=False, kw_only=True)
class Target:
    """A destination for one checkpoint tensor.

    `view` is filled with the region `region` ((start, stop) an axis) of a checkpoint tensor of shape `shape`, axes of one element
    aside. Float dtypes convert into the view's; others must match. An `optional` tensor may be absent: the view keeps what it
    holds. `aliases` are other names under which savers wrote the same tensor; where several are stored, the first fills it.
    With `rows` the stored tensor is a plain matrix that is quantised on its way into the view.
    """

    name: str
    view: Tensor
    shape: tuple[int, ...]
    region: tuple[tuple[int, int], ...]
    optional: bool = False
    aliases: tuple[str, ...] = ()
    rows: RowQuantiser | None = None
