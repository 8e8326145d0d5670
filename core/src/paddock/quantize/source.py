"""The plain checkpoint to quantise: checked whole before any work, then read a layer at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from paddock import axes, layers
from paddock.checkpoint.dtypes import TORCH_NAMES
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.index import stored_tensors
from paddock.checkpoint.matching import Match, match
from paddock.checkpoint.reading import read
from paddock.checkpoint.source import CONFIG, ModelSource
from paddock.checkpoint.targets import Target
from paddock.config import EngineConfig
from paddock.errors import CheckpointError
from paddock.layers import reference_attention
from paddock.planning.formats import choose_model, declared_method
from paddock.planning.notes import Notes
from paddock.plugins import AttentionNeeds, resolve
from paddock.plugins.registry import Registry


@frozen(eq=False, kw_only=True)
class PlainCheckpoint:
    """A plain model on disk. `dtype` is the one its config names, `build` the family's."""

    source: ModelSource
    config: Any
    table: axes.WeightTable
    needs: AttentionNeeds
    build: Callable[[Any, layers.Builder], nn.Module]
    stored: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> str:
        """Return the dtype the checkpoint was saved in."""
        return str(self.config.dtype)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def layer_prefix(self, index: int) -> str:
        """Return what the checkpoint names of a layer begin with."""
        return self.table.layer_source.format(i=index)

    def of_layer(self, index: int) -> dict[str, StoredTensor]:
        """Return the tensors of a layer by name."""
        prefix = self.layer_prefix(index)
        return {name: tensor for name, tensor in self.stored.items() if name.startswith(prefix)}

    def outside_layers(self) -> dict[str, StoredTensor]:
        """Return the tensors of no layer, by name."""
        prefixes = tuple(map(self.layer_prefix, range(self.table.num_layers)))
        return {name: tensor for name, tensor in self.stored.items() if not name.startswith(prefixes)}

    def builder(
        self, part: range, *, outer: bool, dtype: torch.dtype, device: torch.device, max_model_len: int
    ) -> layers.Builder:
        """Return the builder of some layers, with plain torch for every op and for attention: their definition."""
        return layers.Builder(
            self.table,
            method_for=lambda path, linear: layers.PlainMethod.of(linear, dtype),
            ops=layers.Ops(),
            backend=reference_attention.create(self.needs, device),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            outer=outer,
            layers=part,
        )

    def fill(self, model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
        """Load a part of the model from these tensors, each of which it must take."""
        read(self._matched(model, stored), None)

    def check(self) -> None:
        """Raise CheckpointError with every tensor that is missing, unexpected, mis-shaped or of the wrong dtype."""
        whole = range(self.table.num_layers)
        builder = self.builder(whole, outer=True, dtype=getattr(torch, self.dtype), device=torch.device("meta"), max_model_len=2)
        self._matched(self.build(self.config, builder), self.stored)

    def _matched(self, model: nn.Module, stored: Mapping[str, StoredTensor]) -> list[Match]:
        return match(stored, layers.targets(model), ignored_suffixes=self.table.ignored, source=self.source.folder)

    def fingerprint(self) -> str:
        """Return a SHA-256 of config.json and, for each weight file, its name, size, time of change and tensors.

        Weights are not read for it: a file that is written anew counts as changed.
        """
        digest = hashlib.sha256((self.source.folder / CONFIG).read_bytes())
        for file in sorted({tensor.file for tensor in self.stored.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name, tensor in sorted(self.stored.items()):
            digest.update(f"{name} {tensor.file.name} {tensor.dtype} {tensor.shape} {tensor.start}\n".encode())
        return digest.hexdigest()


def open_plain(source: ModelSource, config: EngineConfig, registry: Registry) -> PlainCheckpoint:
    """Return the plain checkpoint of a model folder, checked; raise CheckpointError for one that is quantised already."""
    method = declared_method(source)
    if method:
        raise CheckpointError(
            f"{source.name} is quantised already ({method}): a recipe begins with a plain checkpoint",
            fix="use the model it was made from, in bfloat16, float16 or float32",
        )
    spec, parsed = choose_model(config, registry, source, Notes())
    checkpoint = PlainCheckpoint(
        source=source,
        config=parsed,
        table=resolve(spec.weights)(parsed),
        needs=resolve(spec.attention)(parsed),
        build=resolve(spec.build),
        stored=stored_tensors(source.folder),
    )
    checkpoint.check()
    return checkpoint


def as_stored(tensors: Iterable[StoredTensor]) -> dict[str, Tensor]:
    """Return tensors of a checkpoint as they are, by name, in memory."""
    found: dict[str, Tensor] = {}
    matches = []
    for tensor in tensors:
        found[tensor.name] = torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        region = tuple((0, size) for size in tensor.shape)
        matches.append(Match(tensor, Target(name=tensor.name, view=found[tensor.name], shape=tensor.shape, region=region)))
    read(matches, None)
    return found
