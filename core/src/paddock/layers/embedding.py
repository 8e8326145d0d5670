"""Token embeddings, cut by vocabulary rows where a parallel strategy says so.

T tokens, V vocabulary rows of this rank, E model size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from paddock import axes
from paddock.checkpoint.targets import Target
from paddock.layers.ops import Ops


class Embedding(nn.Module):
    """A table [V, E] gathered by token id; a rank adds nothing for ids it does not hold and `reduce` sums over the ranks.

    `aliases` are the checkpoint names of heads that share the table.
    """

    def __init__(
        self,
        declared: axes.Embedding,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shard: axes.Shard = axes.WHOLE,
        source: str = "",
        aliases: tuple[str, ...] = (),
        reduce: Callable[[Tensor], Tensor] | None = None,
        ops: Ops | None = None,
    ) -> None:
        """Allocate this rank's rows."""
        super().__init__()
        self.ops = ops or Ops()
        self.declared, self.source, self.aliases, self.reduce = declared, source, aliases, reduce
        self.start, self.stop = shard.span(declared.rows)
        table_VE = torch.empty(self.stop - self.start, declared.width.size, dtype=dtype, device=device)
        self.weight = nn.Parameter(table_VE, requires_grad=False)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Return the rows [T, E] of int64 token ids."""
        if self.reduce is None:
            return self.ops.embed(token_ids_T, self.weight)
        held_T = (token_ids_T >= self.start) & (token_ids_T < self.stop)
        x_TE = self.ops.embed((token_ids_T - self.start).where(held_T, 0), self.weight)
        return self.reduce(x_TE * held_T.unsqueeze(-1))

    def targets(self) -> Iterator[Target]:
        """Yield where the checkpoint's table goes."""
        rows, width = self.declared.rows, self.declared.width
        yield Target(
            name=f"{self.source}{rows.source}.weight",
            view=self.weight,
            shape=(rows.size, width.size),
            region=((self.start, self.stop), (0, width.size)),
            aliases=self.aliases,
        )

    def finalise(self) -> None:
        """Leave the table as loaded."""

    def randomise(self, generator: torch.Generator) -> None:
        """Fill the table with random values of a trained model's magnitude."""
        self.weight.normal_(std=0.02, generator=generator)
