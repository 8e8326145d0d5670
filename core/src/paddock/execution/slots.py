"""What is known of each slot: its pages, its prompt's length, what its rows need of the sampler.

S slots, M pages a sequence at most.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paddock.execution.packing import to_device

CPU = torch.device("cpu")


class SlotTable:
    """Per-slot arrays, written at admission and page grants, read when a batch is assembled.

    The page tables lie on the host, which finds a new token's place in them, and once more on the device, which reads the rest:
    a long context's table is sent once, not with every step. One row more than there are slots is padding's.
    """

    def __init__(self, num_slots: int, max_model_len: int, page_size: int, device: torch.device = CPU) -> None:
        """Start with page 0 everywhere and no features; a backend reads no page beyond a sequence's length."""
        self.page_size, self.scratch_slot, self._device = page_size, num_slots, device
        self.block_tables_SM = np.zeros((num_slots + 1, -(-max_model_len // page_size)), dtype=np.int32)
        self.device_tables_SM: Tensor = torch.from_numpy(self.block_tables_SM).to(device)  # shared on a CPU
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
        if pages and self._device.type != "cpu":
            self._send(pages)

    def pad_with(self, page: int) -> None:
        """Let padding read and write `page`, which nobody is granted."""
        self.block_tables_SM[self.scratch_slot] = page
        self.device_tables_SM[self.scratch_slot].fill_(page)

    def _send(self, pages: list[tuple[int, int, list[int]]]) -> None:
        """Bring the device's table up to date; what is sent is read back, for a place may have been granted twice."""
        width = self.block_tables_SM.shape[1]
        at = np.concatenate([np.arange(len(ids), dtype=np.int64) + (slot * width + first) for slot, first, ids in pages])
        sent = to_device({"at": at, "pages": self.block_tables_SM.reshape(-1)[at]}, self._device)
        self.device_tables_SM.view(-1).index_copy_(0, sent["at"], sent["pages"])
