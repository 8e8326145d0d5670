"""Where a model comes from: which names are folders, which are hub ids, and what its small files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from paddock.checkpoint import json_file
from paddock.checkpoint.source import MANIFEST, open_source
from paddock.errors import CheckpointError


def write_model(folder: Path, **files: Any) -> Path:
    """Write a model folder without weights; files are given by stem, as what to write as JSON."""
    folder.mkdir(parents=True)
    for stem, value in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    return folder


def refusal(name: str, **options: Any) -> CheckpointError:
    """Return the error that opening a model ends in."""
    with pytest.raises(CheckpointError) as caught:
        open_source(name, **options)
    return caught.value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the hub's download by a folder made on the spot, and return the calls as they come."""
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(write_model(here / "cache" / "snapshots" / "0123abcd"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_folder_is_read_with_every_small_file(here: Path) -> None:
    """config.json, generation_config.json and the quantisation files come out parsed; the others are not touched."""
    given = {"generation_config": {"eos_token_id": [1, 2]}, "hf_quant_config": {"q": 1}, "tokenizer": {"t": 1}}
    write_model(here / "m", **given, paddock_manifest={"status": "failed"})
    found = open_source("m")
    assert found.manifest == {"status": "failed"}
    assert (found.name, found.folder, found.revision) == ("m", Path("m"), None)
    assert found.config == {"model_type": "llama"}
    assert found.generation_config == {"eos_token_id": [1, 2]}
    assert found.quantization_files == {"hf_quant_config.json": {"q": 1}}
    assert (found.tensor_names, found.read_dtypes()) == (None, None)


def test_a_folder_goes_before_a_hub_id_of_the_same_name(here: Path, hub: list[dict[str, Any]]) -> None:
    """What exists here is meant, even when the hub might know the name as well."""
    write_model(here / "meta-llama" / "Llama")
    assert open_source("meta-llama/Llama").folder == Path("meta-llama/Llama")
    assert not hub


def test_a_hub_id_is_fetched_at_its_revision(hub: list[dict[str, Any]]) -> None:
    """The revision is passed on, the commit that came is remembered, and no pickle or nested file is asked for."""
    found = open_source("owner/name", revision="v1")
    assert (found.folder.name, found.revision) == ("0123abcd", "0123abcd")
    assert (hub[0]["repo_id"], hub[0]["revision"]) == ("owner/name", "v1")
    assert "*.safetensors" in hub[0]["allow_patterns"]
    assert not [pattern for pattern in hub[0]["allow_patterns"] if "bin" in pattern or pattern == "*"]


def test_planning_fetches_no_weights(hub: list[dict[str, Any]]) -> None:
    """Without weights, only the small files are asked for."""
    open_source("owner/name", weights=False)
    assert "*.safetensors" not in hub[0]["allow_patterns"]


def test_the_hub_prefix_overrides_a_folder_called_like_the_owner(here: Path, hub: list[dict[str, Any]]) -> None:
    """`owner/name` is a missing folder where a folder `owner` exists, and `hub:owner/name` is the hub id all the same."""
    (here / "owner").mkdir()
    assert "hub:owner/name" in refusal("owner/name").fix
    assert open_source("hub:owner/name").name == "hub:owner/name"
    assert [call["repo_id"] for call in hub] == ["owner/name"]


@pytest.mark.parametrize(
    "name", ["./owner/name", "/nowhere/name", "a/b/c", "name", "~/no/such", "", "-x/name", "hub:name", "../x"]
)
def test_other_names_never_reach_the_hub(name: str, hub: list[dict[str, Any]]) -> None:
    """A path that does not exist is a missing folder, not a download."""
    assert "there is no model folder" in refusal(name).message
    assert not hub


def test_a_missing_folder_names_the_nearest_one(here: Path) -> None:
    """A slip of the pen is met with the name that was meant."""
    write_model(here / "models" / "smollm2-135m-instruct")
    assert "did you mean 'smollm2-135m-instruct'?" in refusal("models/smollm2-135m-instrct").fix


def test_a_missing_folder_like_no_other_names_some_models_beside_it(here: Path) -> None:
    """What is no model folder is not offered, and a folder full of models gives no endless list."""
    for i in range(9):
        write_model(here / "models" / f"model-{i}")
    (here / "models" / "attic").mkdir()
    fix = refusal("models/unheard-of").fix
    assert fix.startswith("check the path; model folders in 'models': model-0, model-1, model-2, model-3, model-4")
    assert "model-5" not in fix
    assert "attic" not in fix


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_no_file_system_takes_is_refused(name: str) -> None:
    """Endless names and null bytes are an error of their own, not a crash."""
    refusal(name)


def test_an_unreachable_hub_is_a_clear_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the error names the id and says what to do."""

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub. And why\nmany more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refusal("owner/name")
    assert error.message == "owner/name could not be fetched from the Hugging Face hub: cannot reach the hub"
    assert "HF_HUB_OFFLINE" in error.fix
    assert "folder" in error.fix


def test_a_revision_of_a_folder_is_an_error(here: Path) -> None:
    """A folder has one state; a revision that would be ignored is refused."""
    write_model(here / "m")
    assert "revision 'v1'" in refusal("m", revision="v1").message


def test_a_file_in_place_of_a_folder_is_an_error(here: Path) -> None:
    """The error says which folder to give instead."""
    file = write_model(here / "m") / "config.json"
    assert str(file.parent) in refusal(str(file)).fix
    gguf = here / "m" / "m.GGUF"
    gguf.touch()
    assert "is a GGUF file, which nothing here reads" in refusal(str(gguf)).message
    assert "safetensors files of the model the GGUF file was made from" in refusal(str(gguf)).fix


def test_a_folder_without_config_says_what_it_holds(here: Path) -> None:
    """GGUF and nested folders get their own way out."""
    write_model(here / "all" / "one")
    (here / "g").mkdir()
    (here / "g" / "m.gguf").touch()
    assert "one" in refusal("all").fix
    assert "GGUF" in refusal("g").fix


def test_a_folder_that_is_not_quantised_to_its_end_says_so(here: Path) -> None:
    """By its manifest; one that says something else, or cannot be read, leaves it a folder like any other without config."""
    (here / "p").mkdir()
    manifest = here / "p" / MANIFEST
    manifest.write_text(json.dumps({"status": "partial", "layers_done": 3}))
    assert refusal("p").message == "p has no config.json: paddock quantize has not finished it"
    assert "the same paddock quantize command again" in refusal("p").fix
    for other in ('{"status": "complete"}', '{"status": ["partial"]}', "{}", "{"):
        manifest.write_text(other)
        assert "not a model folder" in refusal("p").message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "[" * 100_000, "9" * 5000, "\xff"]
)
def test_malformed_json_is_an_error_that_names_the_file(here: Path, text: str) -> None:
    """Nothing but one whole JSON object with unique keys is taken from a config file."""
    (write_model(here / "m") / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal("m").message


def test_a_huge_config_is_not_read(here: Path) -> None:
    """A file over the limit is refused by its size alone."""
    os.truncate(write_model(here / "m") / "config.json", json_file.MAX_BYTES + 1)
    assert "16,777,217 bytes" in refusal("m").message


def test_a_config_that_is_no_regular_file_is_refused(here: Path) -> None:
    """Reading a named pipe would wait for ever."""
    (write_model(here / "m") / "config.json").unlink()
    os.mkfifo(here / "m" / "config.json")
    assert "not a regular file" in refusal("m").message


def test_reading_the_small_files_needs_no_torch() -> None:
    """Sources, headers and indices are read by planning, which stays free of torch and of the hub's client."""
    code = (
        "import sys, paddock.checkpoint.source, paddock.checkpoint.index; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
