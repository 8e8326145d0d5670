"""What the host knows of each slot: its pages, its prompt's length, what its rows need of the sampler.

S slots, M pages a sequence at most.
"""

from __future__ import annotations

import numpy as np


class SlotTable:
    """Per-slot host arrays, written at admission and page grants, read when a batch is assembled."""

    def __init__(self, num_slots: int, max_model_len: int, page_size: int) -> None:
        """Start with page 0 everywhere and no features; a backend reads no page beyond a sequence's length."""
        self.page_size = page_size
        self.block_tables_SM = np.zeros((num_slots, -(-max_model_len // page_size)), dtype=np.int32)
        self.prompt_lens_S = np.zeros(num_slots, dtype=np.int64)
        self.features_S = np.zeros(num_slots, dtype=np.uint8)

    def admit(self, slot: int, *, prompt_len: int, features: int) -> None:
        """Take a slot's new sequence."""
        self.prompt_lens_S[slot] = prompt_len
        self.features_S[slot] = features

    def grant(self, pages: list[tuple[int, int, list[int]]]) -> None:
        """Enter granted pages: (slot, index of the first, page ids)."""
        for slot, first, ids in pages:
            self.block_tables_SM[slot, first : first + len(ids)] = ids
