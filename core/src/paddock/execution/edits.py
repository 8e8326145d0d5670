"""Edits of single logits: logit bias, bad words, and stop ids barred until min_tokens. All are one table of additions.

B entries, R rows, V vocabulary, W tokens of context, S slots.
"""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from paddock.execution.packing import to_device
from paddock.scheduling.step import Admission

_ALWAYS = np.iinfo(np.int32).max
_ANY = -1  # in a context: every token matches
_BLANK = -2  # in recent output: no token yet, matches nothing


@frozen(eq=False)
class SlotEdits:
    """One sequence's entries: the token, what its logit gains, and when.

    That is while fewer than `until_B` tokens are out and the output ends in `context_BW`.
    """

    token_B: NDArray[np.int64]
    value_B: NDArray[np.float32]
    until_B: NDArray[np.int32]
    context_BW: NDArray[np.int32]

    @property
    def reads_output(self) -> bool:
        """Return whether any entry depends on earlier output tokens."""
        return bool(self.context_BW.shape[1])


def slot_edits(admission: Admission, vocab_size: int) -> SlotEdits | None:
    """Return a sequence's entries, or None when nothing edits its logits."""
    params = admission.params
    entries: list[tuple[int, float, int, tuple[int, ...]]] = [(token, bias, _ALWAYS, ()) for token, bias in params.logit_bias]
    entries += [(word[-1], -np.inf, _ALWAYS, word[:-1]) for word in admission.bad_words_ids if word]
    if params.min_tokens:
        barred = sorted(token for token in admission.stop_ids if 0 <= token < vocab_size)
        entries += [(token, -np.inf, min(params.min_tokens, _ALWAYS), ()) for token in barred]
    if not entries:
        return None
    tokens, values, untils, contexts = zip(*entries, strict=True)
    width = max(map(len, contexts))
    context_BW = np.full((len(entries), width), _ANY, dtype=np.int32)
    for b, context in enumerate(contexts):
        context_BW[b, width - len(context) :] = context
    return SlotEdits(np.array(tokens, np.int64), np.array(values, np.float32), np.array(untils, np.int32), context_BW)


@frozen(eq=False)
class _Table:
    """The entries of a batch on the device; `slot_B` and `row_B` say whose they are."""

    slot_B: Tensor
    row_B: Tensor
    token_B: Tensor
    value_B: Tensor
    until_B: Tensor
    context_BW: Tensor


class Edits:
    """Who edits what, and the recent output tokens that bad words look at. The batch's table is kept until the batch changes."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        """Start with no edits in any slot."""
        self._vocab_size, self._device = vocab_size, device
        self._slots: dict[int, SlotEdits] = {}
        self._recent_SW = torch.full((num_slots, 0), _BLANK, dtype=torch.int32, device=device)
        self._key: object = None
        self._table: _Table | None = None

    def admit(self, admission: Admission) -> bool:
        """Take a slot's new sequence and return whether it edits logits."""
        self._key = None
        self._slots.pop(admission.slot, None)
        edits = slot_edits(admission, self._vocab_size)
        if edits is None:
            return False
        self._slots[admission.slot] = edits
        if edits.reads_output:
            self._remember(admission.slot, admission.token_ids[admission.prompt_len :], edits.context_BW.shape[1])
        return True

    def _remember(self, slot: int, output: list[int], width: int) -> None:
        num_slots, known = self._recent_SW.shape
        if width > known:
            blank = self._recent_SW.new_full((num_slots, width - known), _BLANK)
            self._recent_SW = torch.cat((blank, self._recent_SW), dim=1)
        padded = [_BLANK] * self._recent_SW.shape[1] + output
        recent_W = np.array(padded[len(output) :], dtype=np.int32)
        self._recent_SW[slot] = to_device({"recent": recent_W}, self._device)["recent"]

    def apply(self, logits_RV: Tensor, output_index_R: Tensor, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Add, in place, the entries of `slots`, whose logits lie in `rows`; `output_index_R` counts tokens already out."""
        table = self._batch_table(rows, slots)
        active_B = output_index_R[table.row_B] < table.until_B
        width = table.context_BW.shape[1]
        if width:
            recent_BW = self._recent_SW[table.slot_B, -width:]
            active_B &= ((recent_BW == table.context_BW) | (table.context_BW == _ANY)).all(dim=-1)
        added_B = torch.where(active_B, table.value_B, 0.0)
        logits_RV.index_put_((table.row_B, table.token_B), added_B, accumulate=True)

    def _batch_table(self, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> _Table:
        key = (rows.tobytes(), slots.tobytes())
        if self._table is None or key != self._key:
            self._key, self._table = key, self._build(rows, slots)
        return self._table

    def _build(self, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> _Table:
        edits = [self._slots[slot] for slot in slots.tolist()]
        counts = [len(e.token_B) for e in edits]
        width = max(e.context_BW.shape[1] for e in edits)
        contexts = [np.pad(e.context_BW, ((0, 0), (width - e.context_BW.shape[1], 0)), constant_values=_ANY) for e in edits]
        columns = {
            "slot_B": np.repeat(slots, counts),
            "row_B": np.repeat(rows, counts),
            "token_B": np.concatenate([e.token_B for e in edits]),
            "value_B": np.concatenate([e.value_B for e in edits]),
            "until_B": np.concatenate([e.until_B for e in edits]),
            "context_BW": np.concatenate(contexts),
        }
        return _Table(**to_device(columns, self._device))

    def record(self, token_R: Tensor, slot_R: Tensor) -> None:
        """Append the sampled tokens [R] to the recent output of their slots [R], where anybody looks at it."""
        if self._recent_SW.shape[1]:
            kept_RW = self._recent_SW[slot_R, 1:]
            self._recent_SW[slot_R] = torch.cat((kept_RW, token_R.to(torch.int32)[:, None]), dim=1)
