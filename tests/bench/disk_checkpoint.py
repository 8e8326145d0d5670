"""A whole checkpoint of random weights on disk, for a model of which there is config.json alone.

Names, shapes and dtypes are those of the targets that loading fills, of the model built on no device; each module draws its own
values, as load format `dummy` has it, so that they are valid in its format. Tensors that a checkpoint may lack are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from paddock.assemble import collect
from paddock.checkpoint.dtypes import BITS, STORED_NAMES
from paddock.checkpoint.index import INDEX
from paddock.checkpoint.json_file import read_object
from paddock.checkpoint.source import CONFIG, GENERATION_CONFIG, ModelSource, open_source
from paddock.checkpoint.targets import Target
from paddock.config import EngineConfig
from paddock.errors import CheckpointError, OptionError
from paddock.execution.build import build_model
from paddock.layers import parameters, reference_attention
from paddock.planning import rebuild
from paddock.planning.formats import choose_model
from paddock.planning.hardware import this_cpu
from paddock.planning.notes import Notes
from paddock.planning.resolve import resolve
from paddock.plugins import resolve as imported
from paddock.quantize.manifest import write_json

MARKER = "disk-startup.json"
META = torch.device("meta")
PIECE_BYTES = 16 << 20
WRITERS = 4  # modules that are drawn and written at once,
HELD_BYTES = 4 << 30  # but fewer where the largest would take more than this together
LAYER_KEYS = ("num_hidden_layers", "n_layer")
ANOTHER = "name a new folder with --dir, or remove this one"


@frozen(kw_only=True)
class Place:
    """Where a tensor lies: `nbytes` bytes from byte `start` of a file."""

    file: str
    start: int
    nbytes: int


@frozen(eq=False, kw_only=True)
class Checkpoint:
    """What a folder is to hold: small files and heads of weight files by name, tensors' places; `model` has no memory."""

    model: nn.Module
    small: Mapping[str, Mapping[str, Any]]
    heads: Mapping[str, bytes]
    places: Mapping[str, Place]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes of each weight file."""
        sizes = {name: len(head) for name, head in self.heads.items()}
        for place in self.places.values():
            sizes[place.file] += place.nbytes
        return sizes

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weight files."""
        return sum(self.sizes.values())

    @property
    def digest(self) -> str:
        """Return a SHA-256 of everything but the weights: of config.json and of every tensor's name, dtype, shape and place."""
        digest = hashlib.sha256(json.dumps(self.small, sort_keys=True).encode())
        for name, head in self.heads.items():
            digest.update(name.encode() + head)
        return digest.hexdigest()


def with_layers(model: str, layers: int | None) -> ModelSource:
    """Return the small files of a folder, which then say that the model has so many layers; raise OptionError for too many."""
    source = evolve(open_source(model, weights=False), tensor_names=None)
    if layers is None:
        return source
    asked = EngineConfig(model=model)
    spec, parsed = choose_model(asked, collect(asked), source, Notes())
    has = imported(spec.weights)(parsed).num_layers
    if layers > has:
        raise OptionError(f"--layers is {layers}, and the model has {has}", fix=f"give 1 to {has}")
    key = next((key for key in LAYER_KEYS if key in source.config), LAYER_KEYS[0])
    return evolve(source, config={**source.config, key: layers})


def described(source: ModelSource, shard_bytes: int) -> Checkpoint:
    """Return the checkpoint that config.json describes, in files of at most `shard_bytes` unless a tensor is larger.

    Raises PaddockError for a model that no installed plugin builds.
    """
    asked = EngineConfig(model=source.name, device="cpu", load_format="dummy")
    registry = collect(asked)
    saved = choose_model(asked, registry, source, Notes())[1].dtype
    plan = resolve(evolve(asked, dtype=saved), registry, this_cpu(), source)
    model = build_model(plan, reference_attention.create(rebuild.attention_needs(plan), META), META)
    small = {CONFIG: source.config, **source.quantization_files}
    if source.generation_config:
        small[GENERATION_CONFIG] = source.generation_config
    heads: dict[str, bytes] = {}
    places: dict[str, Place] = {}
    shards = _shards([target for target in parameters.targets(model) if not target.optional], shard_bytes)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        heads[file] = _head(shard)
        start = len(heads[file])
        for target in shard:
            places[target.name] = Place(file=file, start=start, nbytes=_nbytes(target))
            start += _nbytes(target)
    return Checkpoint(model=model, small=small, heads=heads, places=places)


def is_written(checkpoint: Checkpoint, folder: Path) -> bool:
    """Return whether a folder holds this very checkpoint, whole; False where it is empty or not there.

    Raises OptionError where it holds anything else.
    """
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise OptionError(f"--dir is {str(folder)!r}: {error.strerror}", fix="name a folder of your own") from error
    if not names:
        return False
    if MARKER not in names:
        raise OptionError(
            f"--dir is {str(folder)!r}, which is not empty and holds no finished checkpoint: it holds {names[0]!r}", fix=ANOTHER
        )
    if read_object(folder / MARKER).get("digest") != checkpoint.digest:
        raise OptionError(f"--dir is {str(folder)!r}, which holds the checkpoint of another config or layout", fix=ANOTHER)
    for name, size in checkpoint.sizes.items():
        found = (folder / name).stat().st_size if name in names else 0
        if found != size:
            raise OptionError(f"{folder / name} has {found:,} bytes, and {size:,} were written", fix=ANOTHER)
    return True


def check_room(checkpoint: Checkpoint, folder: Path) -> None:
    """Raise OptionError where the disk has too little room."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if checkpoint.nbytes > free:
        raise OptionError(
            f"the checkpoint takes {checkpoint.nbytes:,} bytes, and the disk of {str(folder)!r} has {free:,} free",
            fix="write fewer layers with --layers, or name a folder on a larger disk with --dir",
        )


def write_weights(checkpoint: Checkpoint, folder: Path, device: torch.device) -> None:
    """Write the weight files, drawn on `device`; they are on disk when this returns. Without `finish` they are no model.

    Raises CheckpointError where the disk does not take them.
    """
    modules = [each for each in checkpoint.model.modules() if _wanted(each)]
    largest = max(sum(checkpoint.places[target.name].nbytes for target in _wanted(module)) for module in modules)
    writers = max(1, min(WRITERS, HELD_BYTES // largest))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, ThreadPoolExecutor(writers) as pool:
            files = {name: stack.enter_context((folder / name).open("xb", buffering=0)).fileno() for name in checkpoint.heads}
            for name, head in checkpoint.heads.items():
                os.pwrite(files[name], head, 0)
            written = [pool.submit(_write, each, seed, checkpoint, files, device) for seed, each in enumerate(modules)]
            try:
                for future in as_completed(written):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)
            for file in files.values():
                os.fsync(file)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be written into {folder}: {error.strerror}", fix="make room, or name another disk with --dir"
        ) from error


def finish(checkpoint: Checkpoint, folder: Path) -> None:
    """Make the weight files a model, and last say that it is whole."""
    for name, value in checkpoint.small.items():
        write_json(folder / name, value)
    names = {name: place.file for name, place in checkpoint.places.items()}
    total = sum(place.nbytes for place in checkpoint.places.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    write_json(folder / MARKER, {"digest": checkpoint.digest})


def remove(checkpoint: Checkpoint, folder: Path) -> None:
    """Remove what was written, as far as it was; the marker first."""
    for name in (MARKER, INDEX, *checkpoint.small, *checkpoint.heads):
        for path in (folder / name, folder / f"{name}.new"):
            path.unlink(missing_ok=True)


def _shards(targets: list[Target], most: int) -> list[list[Target]]:
    """Return the targets in their order, cut where the next would not fit."""
    shards: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if shards[-1] and size + _nbytes(target) > most:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += _nbytes(target)
    return shards


def _head(shard: list[Target]) -> bytes:
    """Return what precedes the data of a safetensors file: the header's length, then the header, filled up to eight bytes."""
    entries, start = {}, 0
    for target in shard:
        end = start + _nbytes(target)
        entries[target.name] = {"dtype": _dtype(target), "shape": list(target.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _dtype(target: Target) -> str:
    return STORED_NAMES[str(target.view.dtype).removeprefix("torch.")]


def _nbytes(target: Target) -> int:
    return math.prod(target.shape) * BITS[_dtype(target)] // 8


def _wanted(module: nn.Module) -> list[Target]:
    """Return where a module wants tensors that a checkpoint must hold."""
    return [each for each in module.targets() if not each.optional] if isinstance(module, parameters.Loadable) else []


def _write(module: nn.Module, seed: int, checkpoint: Checkpoint, files: Mapping[str, int], device: torch.device) -> None:
    """Give a module memory, draw its values, write them, and let the memory go."""
    assert isinstance(module, parameters.Loadable)
    module.to_empty(device=device, recurse=False)
    module.randomise(torch.Generator(device).manual_seed(seed))
    for target in _wanted(module):
        place = checkpoint.places[target.name]
        start = place.start
        for piece in _pieces(target.view):
            rest = piece.numpy().data
            while rest:
                count = os.pwrite(files[place.file], rest, start)
                rest, start = rest[count:], start + count
        assert start == place.start + place.nbytes, target.name
    module.to_empty(device=META, recurse=False)


def _pieces(view: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a tensor, row-major, in host memory."""
    flat = view.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), PIECE_BYTES):
        piece = flat[start : start + PIECE_BYTES]
        yield piece if piece.device.type == "cpu" else torch.empty(piece.shape, dtype=torch.uint8, pin_memory=True).copy_(piece)
