"""Which files make up a checkpoint: one file, an index of shards, or a refusal that says the way out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file

from paddock.checkpoint.index import INDEX, stored_tensors
from paddock.checkpoint.source import open_source
from paddock.errors import CheckpointError
from paddock.planning.plan import Wanted

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder: Path, *, weight_map: Any = None) -> Path:
    """Write two shards with tensors a and b, and an index of them, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2)}, folder / FIRST)
    save_file({"b": torch.ones(3)}, folder / SECOND)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map or {"a": FIRST, "b": SECOND}}))
    return folder


def refusal(folder: Path) -> CheckpointError:
    """Return the error that a folder's checkpoint ends in."""
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(folder)
    return caught.value


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    """Every tensor of the index is found in its own file."""
    found = stored_tensors(write_shards(tmp_path))
    assert {name: (tensor.file.name, tensor.shape) for name, tensor in found.items()} == {"a": (FIRST, (2,)), "b": (SECOND, (3,))}


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_needs_no_index(tmp_path: Path, name: str) -> None:
    """One safetensors file is the checkpoint, whatever it is called."""
    save_file({"a": torch.ones(2)}, tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert stored_tensors(tmp_path).keys() == {"a"}


def test_dtypes_are_read_from_every_file_or_not_at_all(tmp_path: Path) -> None:
    """As torch names them; nothing is said of a checkpoint with a file missing, or one that is cut short."""
    folder = write_shards(tmp_path)
    (folder / "config.json").write_text("{}")
    save_file({"b": torch.ones(3, dtype=torch.bfloat16)}, folder / SECOND)
    assert open_source(str(folder)).read_dtypes() == {"a": "float32", "b": "bfloat16"}
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])
    assert open_source(str(folder)).read_dtypes() is None
    (folder / SECOND).unlink()
    assert open_source(str(folder)).read_dtypes() is None


def test_headers_are_read_once_a_source(tmp_path: Path) -> None:
    """What dtypes were asked from is what weights are checked by."""
    folder = write_shards(tmp_path)
    (folder / "config.json").write_text("{}")
    source = open_source(str(folder))
    assert source.read_dtypes() == {"a": "float32", "b": "float32"}
    (folder / SECOND).write_bytes(b"")
    source.check_weights({"a": Wanted("bfloat16", (1, 2)), "b": Wanted("float64", (3,)), "c": Wanted("int8", ())})
    with pytest.raises(CheckpointError, match=r"'b': has shape \[3\]; the model wants F32 \[4\]"):
        source.check_weights({"b": Wanted("float32", (4,))})


def test_a_file_that_is_missing_is_none_of_a_hub_models_faults(tmp_path: Path) -> None:
    """It is fetched when weights are; in a folder of the user's own it is missing, and without any file nothing is at hand."""
    folder = write_shards(tmp_path)
    (folder / "config.json").write_text("{}")
    (folder / SECOND).unlink()
    source = open_source(str(folder))
    with pytest.raises(CheckpointError, match=f"{SECOND}: missing"):
        source.check_weights({})
    evolve(source, revision="0123abcd").check_weights({})
    (folder / FIRST).unlink()
    open_source(str(folder)).check_weights({"a": Wanted("int8", ())})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    """A folder with pickled weights alone is not loaded, and the error says what to use instead."""
    (tmp_path / name).write_bytes(b"pickle")
    error = refusal(tmp_path)
    assert name in error.message
    assert "safetensors" in error.fix


def test_gguf_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """A GGUF file is named for what it is."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refusal(tmp_path).message


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    """Neither holds weights, and both errors say so."""
    assert "holds no weights" in refusal(tmp_path).message
    assert "cannot be read" in refusal(tmp_path / "none").message


@pytest.mark.parametrize("also", [[], ["model.safetensors"]])
def test_shards_without_an_index_are_refused(tmp_path: Path, also: list[str]) -> None:
    """Without the index nobody knows whether the shards are all there."""
    write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    for name in also:
        save_file({"c": torch.ones(1)}, tmp_path / name)
    assert f"no {INDEX}" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "..",
        "a.bin",
        "",
        "a\\b.safetensors",
        "a\0.safetensors",
        3,
        None,
    ],
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, file: object) -> None:
    """The index may name plain safetensors files beside it and nothing else."""
    assert "is not the plain name" in refusal(write_shards(tmp_path, weight_map={"a": FIRST, "b": file})).message


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A shard that is a link to a file elsewhere is not followed."""
    folder = write_shards(tmp_path / "model")
    (folder / SECOND).rename(tmp_path / "elsewhere.safetensors")
    (folder / SECOND).symlink_to(tmp_path / "elsewhere.safetensors")
    assert "a link out of the model folder" in refusal(folder).message


def test_links_into_the_blobs_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """The hub's cache keeps files as blobs and links to them from a commit's folder."""
    folder = write_shards(tmp_path / "models--o--m" / "snapshots" / "0123abc")
    blobs = tmp_path / "models--o--m" / "blobs"
    blobs.mkdir()
    for name in (FIRST, SECOND):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("../../blobs") / name)
    assert stored_tensors(folder).keys() == {"a", "b"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The file that is not there is in the error."""
    folder = write_shards(tmp_path)
    (folder / SECOND).unlink()
    assert f"{SECOND}: missing" in refusal(folder).message


def test_a_shard_the_index_does_not_mention_is_named(tmp_path: Path) -> None:
    """A shard left over from another model is not passed over in silence."""
    assert f"{SECOND}: a weight file that" in refusal(write_shards(tmp_path, weight_map={"a": FIRST})).message


def test_index_and_shards_must_agree_on_every_tensor(tmp_path: Path) -> None:
    """Tensors that only the index has, only a shard has, or that lie in another shard are all named in one error."""
    error = refusal(write_shards(tmp_path, weight_map={"a": SECOND, "ghost": FIRST}))
    assert f"{FIRST}: tensor 'ghost' is in {INDEX} but not in the file" in error.message
    assert f"{FIRST}: tensor 'a' is here, but {INDEX} says {SECOND}" in error.message
    assert f"{SECOND}: tensor 'b' is here, but {INDEX} has no such tensor" in error.message


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    """No one could say which of them is meant."""
    folder = write_shards(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / SECOND)
    assert f"{SECOND}: tensor 'a' is in {FIRST} as well" in refusal(folder).message


def test_faults_of_all_shards_are_said_at_once(tmp_path: Path) -> None:
    """Two truncated shards make one error that names both."""
    folder = write_shards(tmp_path)
    for name in (FIRST, SECOND):
        os.truncate(folder / name, (folder / name).stat().st_size - 1)
    error = refusal(folder)
    assert f"{FIRST}: truncated" in error.message
    assert f"{SECOND}: truncated" in error.message


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}', "{" * 100_000, "\xff"]
)
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    """An index that is no JSON object with a weight_map is named."""
    folder = write_shards(tmp_path)
    (folder / INDEX).write_text(text, encoding="latin-1")
    assert INDEX in refusal(folder).message
