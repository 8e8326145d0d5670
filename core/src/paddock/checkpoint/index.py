"""Which safetensors files make up a checkpoint, and which tensors they hold. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paddock.checkpoint.header import StoredTensor, read_header
from paddock.checkpoint.json_file import read_object
from paddock.checkpoint.problems import Problems, quoted
from paddock.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
_PLAIN_NAME = re.compile(r"\w[\w.+ -]{0,200}\.safetensors", re.ASCII)
_FETCH = "fetch the model again, whole"


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint in `folder` by name, from the headers alone.

    Raises CheckpointError with everything wrong in the index and the headers, or when there are no safetensors files.
    """
    problems, names = Problems(), _names(folder)
    if INDEX in names:
        found = _indexed(folder, names, _weight_map(folder, problems), problems)
    else:
        found = _headers(folder, [_single(folder, names)], problems)
    problems.refuse(f"the weights in {folder} are not sound", fix=_FETCH)
    return found


def stored_names(folder: Path) -> frozenset[str] | None:
    """Return the names of the checkpoint's tensors as its index, or its only file, lists them; None where that cannot be read.

    Quick, and nothing is checked: `stored_tensors` does that before weights are read.
    """
    try:
        names = _names(folder)
        if INDEX in names:
            return frozenset(_weight_map(folder, Problems()))
        problems = Problems()
        found = _headers(folder, [_single(folder, names)], problems)
    except CheckpointError:
        return None
    return None if problems else frozenset(found)


def why_unsound(folder: Path) -> CheckpointError | None:
    """Return what `stored_tensors` raises for a folder with safetensors files; None where it does not, or there are none."""
    try:
        if any(name.endswith(".safetensors") for name in _names(folder)):
            stored_tensors(folder)
    except CheckpointError as error:
        return error
    return None


def stored_files(folder: Path) -> dict[str, bool]:
    """Return for each safetensors file of the checkpoint whether it is there; nothing where the folder does not say which."""
    try:
        names = _names(folder)
        files = set(_weight_map(folder, Problems()).values()) if INDEX in names else {_single(folder, names)}
    except CheckpointError:
        return {}
    return {file: (folder / file).exists() for file in sorted(files)}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}", fix="check the path and its permissions") from error


def _single(folder: Path, names: list[str]) -> str:
    """Return the name of the one safetensors file of a folder without an index."""
    files = [name for name in names if name.endswith(".safetensors")]
    shards = [name for name in files if _SHARD.fullmatch(name)]
    if len(files) == 1 or (SINGLE in files and not shards):
        return SINGLE if SINGLE in files else files[0]
    if files:
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files but no {INDEX}", fix=_FETCH)
    raise _without_safetensors(folder, names)


def _without_safetensors(folder: Path, names: list[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return CheckpointError(
            f"{folder} holds weights as pickle ({pickles[0]}), which can run code when loaded, and no safetensors",
            fix="use the model's safetensors files; where there are none, convert it once, offline, with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)",
        )
    if any(name.endswith(".gguf") for name in names):
        return CheckpointError(
            f"{folder} holds GGUF weights, which Paddock does not read",
            fix="use the safetensors files of the model that the GGUF file was made from",
        )
    return CheckpointError(f"{folder} holds no weights: no {SINGLE}, no {INDEX}", fix=_FETCH)


def _weight_map(folder: Path, problems: Problems) -> dict[str, str]:
    """Return tensor name to file name as the index says, without the entries that are unsafe."""
    weight_map: Any = read_object(folder / INDEX, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to file names", fix=_FETCH)
    plain = {name: file for name, file in weight_map.items() if isinstance(file, str) and _PLAIN_NAME.fullmatch(file)}
    for name in weight_map.keys() - plain.keys():
        problems.add(f"{INDEX}: {quoted(weight_map[name])} is not the plain name of a .safetensors file")
    return plain


def _indexed(folder: Path, names: list[str], weight_map: dict[str, str], problems: Problems) -> dict[str, StoredTensor]:
    """Return the tensors of the files of an index; file and index must say the same about every one."""
    files = sorted(set(weight_map.values()))
    for name in names:
        if name not in files and (_SHARD.fullmatch(name) or name == SINGLE):
            problems.add(f"{name}: a weight file that {INDEX} does not mention")
    for file in files:
        if not _stays_inside(folder / file, folder):
            problems.add(f"{file}: a link out of the model folder, to {(folder / file).resolve()}")
    found = {} if problems else _headers(folder, files, problems)
    if problems:
        return found
    for name in weight_map.keys() | found.keys():
        listed, held = weight_map.get(name), found[name].file.name if name in found else None
        if held is None:
            problems.add(f"{listed}: tensor {quoted(name)} is in {INDEX} but not in the file")
        elif listed != held:
            problems.add(
                f"{held}: tensor {quoted(name)} is here, but {INDEX} {f'says {listed}' if listed else 'has no such tensor'}"
            )
    return found


def _headers(folder: Path, files: list[str], problems: Problems) -> dict[str, StoredTensor]:
    """Return the tensors of all `files` together."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        path = folder / file
        if not path.exists():
            problems.add(f"{file}: missing")
            continue
        for name, tensor in read_header(path, problems).items():
            if name in found:
                problems.add(f"{file}: tensor {quoted(name)} is in {found[name].file.name} as well")
            found[name] = tensor
    return found


def _stays_inside(path: Path, folder: Path) -> bool:
    """Return whether a file is truly in its model folder, or in the blob store of the hub cache the folder belongs to."""
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    return any(path.resolve().is_relative_to(root) for root in roots)
