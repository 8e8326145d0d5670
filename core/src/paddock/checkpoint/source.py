"""Where a model comes from: a folder, or a hub id fetched into a folder, and its small JSON files. Free of torch.

How a name is read, in this order:
1. a folder that exists is that folder;
2. `hub:owner/name` is a hub id;
3. `owner/name` is a hub id, unless a folder `owner` exists here;
4. anything else is a folder that is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import field, frozen

from paddock.checkpoint import fitting, hub
from paddock.checkpoint.dtypes import TORCH_NAMES
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.index import stored_files, stored_names, stored_tensors, why_unsound
from paddock.checkpoint.json_file import read_object
from paddock.checkpoint.scalars import stored_scalars
from paddock.errors import CheckpointError, did_you_mean
from paddock.planning.plan import Wanted

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
MANIFEST, MOST_OF_MANIFEST = "paddock_manifest.json", 64 << 20  # bytes
_NO_GGUF = "safetensors files of the model the GGUF file was made from"
PARTIAL = "partial"  # what a manifest's status says until quantising has ended
_HUB = "hub:"
_SHOWN = 5  # names in a hint


@frozen(kw_only=True)
class ModelSource:
    """A model folder and what its small JSON files say, by file name, parsed.

    `name` is what the user wrote; `revision` the commit that was fetched, None for a folder of the user's own.
    `generation_config`, `quantization_files` and `manifest`, what `paddock quantize` says of a folder it made, are empty where
    the folder has no such file. `tensor_names` is None where the folder holds no weights, or none that are sound; `unsound` then
    says why.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] = field(factory=dict)
    quantization_files: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    manifest: Mapping[str, Any] = field(factory=dict)
    revision: str | None = None
    tensor_names: frozenset[str] | None = None
    unsound: CheckpointError | None = None

    @cached_property
    def _stored(self) -> Mapping[str, StoredTensor]:
        """Return every tensor, from the headers of all files: some 15 ms for 1,000 tensors. Raises CheckpointError."""
        return stored_tensors(self.folder)

    def read_dtypes(self) -> Mapping[str, str] | None:
        """Return each tensor's dtype by its name, None where `tensor_names` is or where a file of weights is not sound."""
        if self.tensor_names is None:
            return None
        try:
            return {name: TORCH_NAMES.get(tensor.dtype, tensor.dtype) for name, tensor in self._stored.items()}
        except CheckpointError:
            return None

    def check_weights(self, wanted: Mapping[str, Wanted]) -> None:
        """Raise the CheckpointError of loading where files are unsound or a tensor does not fit what is wanted under its name.

        Nothing is looked at where no file of weights is at hand. Of a model of the hub some may not have been fetched yet; in a
        folder of the user's own they are missing.
        """
        if self.unsound is not None:
            raise self.unsound
        if self.tensor_names is None:
            return
        there = stored_files(self.folder).values()
        if any(there) and (all(there) or self.revision is None):
            fitting.check(self._stored, wanted, source=self.folder)

    def read_scalars(self, names: Iterable[str]) -> Mapping[str, float]:
        """Return those of the named tensors that are one float each, by name; none where weights are not sound."""
        try:
            return stored_scalars(self._stored, names)
        except (CheckpointError, OSError):
            return {}


def open_source(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Return the model that `name` says; a hub id is fetched first, without its weights when `weights` is False.

    Raises CheckpointError when there is no such folder or hub id, or its JSON files are missing or malformed.
    """
    folder = _existing_folder(name)
    if folder is not None and revision is not None:
        raise CheckpointError(f"{name} is a folder, it has no revision {revision!r}", fix="leave the revision out")
    if folder is not None:
        return _read(name, folder, None)
    hub_id = name.removeprefix(_HUB)
    if not hub.is_hub_id(hub_id) or (hub_id == name and Path(name).parent.is_dir()):
        raise _missing(name)
    fetched = hub.fetch(hub_id, revision, weights=weights)
    return _read(name, fetched, fetched.name)


def _existing_folder(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        if path.is_file():
            if path.suffix.casefold() == ".gguf":
                raise CheckpointError(f"{name} is a GGUF file, which nothing here reads", fix=f"use the {_NO_GGUF}")
            raise CheckpointError(f"{name} is a file", fix=f"give the folder it is in: {path.parent}")
        return path if name and path.is_dir() else None
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name!r} is not the name of a folder: {error}", fix="check the path") from error


def _missing(name: str) -> CheckpointError:
    """Return the error for a folder that is not there, naming the nearest one that is."""
    path = Path(name).expanduser()
    parent = path.parent
    try:
        siblings = [folder.name for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    except OSError:
        return CheckpointError(f"there is no model folder {name!r}: {str(parent)!r} does not exist either", fix="check the path")
    hint = did_you_mean(path.name, siblings)
    if not hint.endswith("?"):
        models = [each for each in sorted(siblings) if (parent / each / CONFIG).is_file()][:_SHOWN]
        hint = f"check the path; model folders in {str(parent)!r}: {', '.join(models) or 'none'}"
    if hub.is_hub_id(name):
        hint += f"; for the model on the Hugging Face hub, write {_HUB}{name}"
    return CheckpointError(f"there is no model folder {name!r}", fix=hint)


def _read(name: str, folder: Path, revision: str | None) -> ModelSource:
    if not (folder / CONFIG).exists():
        raise _without_config(folder)
    names = stored_names(folder)
    return ModelSource(
        name=name,
        folder=folder,
        config=read_object(folder / CONFIG),
        generation_config=_read_optional(folder / GENERATION_CONFIG),
        quantization_files={file: read_object(folder / file) for file in QUANTIZATION_FILES if (folder / file).exists()},
        manifest=_read_optional(folder / MANIFEST, max_bytes=MOST_OF_MANIFEST),
        revision=revision,
        tensor_names=names,
        unsound=why_unsound(folder) if names is None else None,
    )


def _read_optional(path: Path, **limits: int) -> dict[str, Any]:
    return read_object(path, **limits) if path.exists() else {}


def _without_config(folder: Path) -> CheckpointError:
    """Return the error for a folder without config.json, by what it holds instead."""
    if _is_partial(folder):
        return CheckpointError(
            f"{folder} has no {CONFIG}: paddock quantize has not finished it",
            fix="run the same paddock quantize command again, which goes on where it stopped",
        )
    return CheckpointError(f"{folder} has no {CONFIG}: it is not a model folder", fix=_instead(folder))


def _is_partial(folder: Path) -> bool:
    """Return whether a manifest, if there is one that can be read, says that its quantising has not ended."""
    try:
        return _read_optional(folder / MANIFEST, max_bytes=MOST_OF_MANIFEST).get("status") == PARTIAL
    except CheckpointError:
        return False


def _instead(folder: Path) -> str:
    """Return which folder or files to give instead of a folder without config.json."""
    if any(folder.glob("*.gguf")):
        return f"Paddock does not read GGUF; use the {_NO_GGUF}"
    if any(folder.glob("*.pth")):
        return "Paddock does not read pickles; use the model in the Hugging Face layout, with safetensors files"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"give one of the model folders in it: {', '.join(inside[:5])}"
    return "give the folder that holds config.json, the weights and the tokenizer"
