"""Log-probabilities of chosen and most likely tokens, of the model's own distribution: before temperature, penalties and filters.

R rows, V vocabulary, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from paddock.request import Logprob, TokenLogprobs


@frozen(eq=False)
class TopLogprobs:
    """The N most likely tokens of each row, in order, and the chosen one with its rank (1 is the most likely)."""

    top_RN: Tensor
    top_ids_RN: Tensor
    chosen_R: Tensor
    chosen_ids_R: Tensor
    rank_R: Tensor

    def to_host(self) -> TopLogprobs:
        """Return a copy in host memory; from a GPU it arrives later, in stream order."""
        fields = (self.top_RN, self.top_ids_RN, self.chosen_R, self.chosen_ids_R, self.rank_R)
        return TopLogprobs(*(to_host(tensor) for tensor in fields))

    def rows(self, widths: Sequence[int]) -> list[TokenLogprobs]:
        """Return each row's chosen token, then its `widths[r]` most likely ones. Call it on a copy that has arrived."""
        top, top_ids, ranks = self.top_RN.tolist(), self.top_ids_RN.tolist(), self.rank_R.tolist()
        chosen, chosen_ids = self.chosen_R.tolist(), self.chosen_ids_R.tolist()
        found: list[TokenLogprobs] = []
        for r, width in enumerate(widths):
            row = {chosen_ids[r]: Logprob(chosen[r], ranks[r])}
            for n in range(min(width, len(top[r]))):
                row.setdefault(top_ids[r][n], Logprob(top[r][n], n + 1))
            found.append(row)
        return found


def to_host(tensor: Tensor) -> Tensor:
    """Return the tensor if it is on the host, else a pinned copy that arrives in stream order."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def top_logprobs(logits_RV: Tensor, chosen_ids_R: Tensor, count: int) -> TopLogprobs:
    """Return the `count` most likely tokens of each row of raw logits and the chosen one (int64)."""
    total_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    top_RN, top_ids_RN = logits_RV.topk(min(count, logits_RV.shape[-1]), dim=-1)
    chosen_R1 = logits_RV.gather(-1, chosen_ids_R[:, None])
    rank_R = (logits_RV > chosen_R1).sum(-1) + 1
    return TopLogprobs(top_RN - total_R1, top_ids_RN, (chosen_R1 - total_R1)[:, 0], chosen_ids_R, rank_R)
