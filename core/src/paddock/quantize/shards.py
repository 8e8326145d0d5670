"""Tensors gathered into shards: layers follow one another until the next would not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from paddock.quantize.folder import OutputFolder


class ShardWriter:
    """Gathers the tensors of layers. Where shards end depends on sizes alone, so a resumed run ends them at the same places."""

    def __init__(self, folder: OutputFolder, max_bytes: int) -> None:
        """Begin with nothing gathered."""
        self._folder, self._max_bytes = folder, max_bytes
        self._gathered: dict[str, Tensor] = {}
        self._bytes = self._last = 0

    def add(self, tensors: Mapping[str, Tensor]) -> int:
        """Take the tensors of a layer, on the CPU; return their bytes."""
        self._last = sum(tensor.nbytes for tensor in tensors.values())
        self._gathered |= tensors
        self._bytes += self._last
        return self._last

    @property
    def is_full(self) -> bool:
        """Return whether another layer of the size of the last would be too much."""
        return self._bytes + self._last > self._max_bytes

    def flush(self) -> None:
        """Write what is gathered, in the order of names, as shards of at most the allowed size; a larger tensor gets its own."""
        shard: dict[str, Tensor] = {}
        size = 0
        for name in sorted(self._gathered):
            tensor = self._gathered[name]
            if shard and size + tensor.nbytes > self._max_bytes:
                self._folder.add_shard(shard)
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
        if shard:
            self._folder.add_shard(shard)
        self._gathered, self._bytes, self._last = {}, 0, 0
