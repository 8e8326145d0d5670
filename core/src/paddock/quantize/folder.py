"""The folder a quantised model is written into: begun, resumed, and whole only at its end.

While it is made the folder holds a manifest that says `partial` and a hidden folder with the shards so far, so that nothing takes
it for a model. At the end shards get their final names, small files and the index follow, and config.json comes last.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock import log
from paddock.checkpoint.index import INDEX, PICKLES
from paddock.checkpoint.source import CONFIG, MANIFEST, PARTIAL
from paddock.errors import CheckpointError, OptionError
from paddock.quantize.manifest import File, Manifest, Shard, differences, read_manifest, sync_names, write_json

_WORK = ".paddock-work"
_BEGUN = (_WORK, f"{MANIFEST}.new")
_STATE = "residual_stream"
_SMALL_BYTES = 64 << 20
_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_AGAIN = "then run the same command again: what is finished is kept"


class OutputFolder:
    """One folder and its manifest; every change of the manifest is on disk before the next step begins."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Take over a folder that `opened` has checked."""
        self.path, self.manifest = path, manifest
        self._fresh: list[Shard] = []

    @classmethod
    @contextmanager
    def opened(cls, path: Path, made_from: Mapping[str, Any]) -> Iterator[OutputFolder]:
        """Yield the folder, begun or resumed, for this run alone.

        Raises OptionError where something else is in it, where it is finished, was begun from something else, or another run
        writes it, and CheckpointError where it cannot be written or what it holds is damaged.
        """
        _check_begun(path)
        with _writing(path):
            try:
                (path / _WORK).mkdir(parents=True, exist_ok=True)
            except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:  # a link to nothing, below a file, /proc
                raise OptionError(f"out is {str(path)!r}: {error.strerror}", fix="name a new folder") from error
        with _alone(path):
            if not _check_begun(path):  # again: another run may have ended in between
                with _writing(path):
                    Manifest(status=PARTIAL, made_from=dict(made_from)).write(path)
            folder = cls(path, read_manifest(path))
            folder._check_resumable(made_from)
            yield folder

    def _check_resumable(self, made_from: Mapping[str, Any]) -> None:
        changed = differences(self.manifest.made_from, made_from)
        if changed:
            lines = "".join(f"\n    {line}" for line in changed)
            raise OptionError(
                f"out is {str(self.path)!r}, which was begun otherwise and cannot be resumed:{lines}",
                fix="repeat the command it was begun with, or name a new folder",
            )
        kept = [(shard.file, self._where(number)) for number, shard in enumerate(self.manifest.shards, 1)]
        if self.manifest.activations is not None:
            kept.append((self.manifest.activations, self._work / self.manifest.activations.name))
        for file, path in kept:
            if not path.is_file() or path.stat().st_size != file.nbytes or _sha256(path) != file.sha256:
                raise CheckpointError(f"{path} is not what was written before", fix=f"remove {self.path} and begin anew")

    def add_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into a shard, which counts from the next `keep` on."""
        number = len(self.manifest.shards) + len(self._fresh) + 1
        file = self._save(f"shard-{number:05}.safetensors", tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._fresh.append(Shard(file=file, tensors=tuple(sorted(tensors)), tensor_bytes=size))

    def keep(self, layers_done: int, activations: Tensor | None, *, outside_done: bool = False) -> None:
        """Make what was written so far what a resumed run begins with."""
        old = self.manifest.activations
        state = None if activations is None else self._save(f"activations-{layers_done:05}", {_STATE: activations})
        self._change(
            layers_done=layers_done,
            shards=(*self.manifest.shards, *self._fresh),
            activations=state,
            outside_done=outside_done,
        )
        self._fresh.clear()
        if old is not None:
            (self._work / old.name).unlink()

    def activations(self) -> Tensor | None:
        """Return the residual stream that was kept, if any."""
        kept = self.manifest.activations
        return None if kept is None else load_file(self._work / kept.name)[_STATE]

    def note_gate(self, gate: Mapping[str, Any]) -> None:
        """Write down what the gate measured so far."""
        self._change(gate=dict(gate))

    def finish(self, source: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the folder a model: shards and index, the small files of `source`, then `files`, config.json last."""
        shards = [
            evolve(shard, file=evolve(shard.file, name=_final_name(number, len(self.manifest.shards))))
            for number, shard in enumerate(self.manifest.shards, 1)
        ]
        with _writing(self.path):
            for number, shard in enumerate(shards, 1):
                self._where(number).replace(self.path / shard.file.name)
            for path in _small_files(source):
                if path.name not in files:
                    shutil.copyfile(path, self.path / path.name)
            weight_map = {name: shard.file.name for shard in shards for name in shard.tensors}
            total = sum(shard.tensor_bytes for shard in shards)
            write_json(self.path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
            for name in sorted(files, key=lambda name: (name == CONFIG, name)):
                write_json(self.path / name, files[name])
        self._change(shards=tuple(shards))

    def close(self, status: str) -> None:
        """Say how it ended, and remove what is left of the work: until then, the lock too, which keeps other runs out."""
        self._change(status=status)
        shutil.rmtree(self._work, ignore_errors=True)

    @property
    def _work(self) -> Path:
        return self.path / _WORK

    def _where(self, number: int) -> Path:
        """Return where a shard is: still among the work, or at its final place."""
        shards = self.manifest.shards
        final = self.path / _final_name(number, len(shards))
        return final if final.exists() else self._work / f"shard-{number:05}.safetensors"

    def _change(self, **changes: Any) -> None:
        with _writing(self.path / MANIFEST):
            self.manifest = evolve(self.manifest, **changes)
            self.manifest.write(self.path)

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> File:
        path = self._work / name
        with _writing(path):
            self._work.mkdir(exist_ok=True)
            save_file(dict(tensors), path, metadata={"format": "pt"})
            shutil.copymode(self.path / MANIFEST, path)  # safetensors makes files that only their owner can read
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sync_names(self._work)
            return File(name=name, nbytes=path.stat().st_size, sha256=_sha256(path))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"{path} cannot be written: {reason}", fix=f"make room on the disk, or the folder writable, {_AGAIN}"
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go of the lock when the process ends, however it ends."""
    with _writing(path):
        lock = (path / _WORK / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"out is {str(path)!r}, which another run is writing", fix="wait for it, or name a new folder"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be locked against other runs: {error.strerror}", fix="name a folder on a local disk"
            ) from error
        yield


def _check_begun(path: Path) -> bool:
    """Return whether a run has begun this folder; raise OptionError where it is finished, or holds something else."""
    names = _names(path)
    if MANIFEST not in names:
        if names:
            raise OptionError(f"out is {str(path)!r}, which is not empty: it holds {names[0]!r}", fix="name a new folder")
        return False
    status = read_manifest(path).status
    if status != PARTIAL:
        raise OptionError(f"out is {str(path)!r}, which holds a quantised model already ({status})", fix="name a new folder")
    return True


def _names(path: Path) -> list[str]:
    """Return what is in a folder, but for what a run leaves that was stopped before it wrote its manifest."""
    try:
        return sorted(each.name for each in path.iterdir() if each.name not in _BEGUN) if path.exists() else []
    except OSError as error:
        raise OptionError(f"out is {str(path)!r}: {error.strerror}", fix="name a new folder") from error


def _small_files(source: Path) -> list[Path]:
    """Return the files of a model folder that are neither weights nor hidden."""
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    others = [path for path in files if not path.name.endswith(_WEIGHTS)]
    for path in others:
        if path.stat().st_size > _SMALL_BYTES:
            log.get_logger().warning("file_not_copied", file=path.name, nbytes=path.stat().st_size, most=_SMALL_BYTES)
    return [path for path in others if path.stat().st_size <= _SMALL_BYTES]


def _final_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
