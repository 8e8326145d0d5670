"""A run that is interrupted goes on, and its result is the same; whatever is wrong is said before anything is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from paddock.checkpoint.source import MANIFEST
from paddock.cli.main import main
from paddock.errors import CheckpointError, OptionError, PaddockError
from paddock.quantize import folder as folders
from paddock.quantize.manifest import write_json
from paddock.quantize.stack import LayerStack, LoadedLayer
from tests.quantize.made import LAYERS, LENGTH, SAMPLES, TEXT, random_llama, run, tensors_of, write_model

SMALL = 60_000  # bytes a shard: about one layer
RECIPES = ("fp8-static", "fp8-dynamic", "fp8-official", "awq")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a finished folder."""
    assert all(path.is_file() for path in folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, layer: int) -> list[int]:
    """Stop every later run where it would load `layer`, as Ctrl-C does; return the list of layers that were loaded."""
    load, loaded = LayerStack.load, list[int]()

    def stopping(self: LayerStack, index: int) -> LoadedLayer:
        if index == layer:
            raise KeyboardInterrupt
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(LayerStack, "load", stopping)
    return loaded


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_an_interrupted_run_ends_in_the_same_bytes(llama: Path, tmp_path: Path, recipe: str, layer: int) -> None:
    """Layers that were written are not done again, and every file is that of a run that was never stopped, manifest included."""
    run(llama, tmp_path / "whole", recipe, max_shard_bytes=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        first = interrupt_at(patch, layer)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", recipe, max_shard_bytes=SMALL)
    partial = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert partial["status"] == "partial"
    assert not (tmp_path / "out/config.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        second = interrupt_at(patch, LAYERS)
        manifest = run(llama, tmp_path / "out", recipe, max_shard_bytes=SMALL)
    assert first == list(range(layer))
    assert second == list(range(partial["layers_done"], LAYERS))
    assert partial["layers_done"] >= layer - 1
    assert manifest.status == "complete"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_stopped_while_it_finishes_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that have their final names already are found there."""
    run(llama, tmp_path / "whole", "fp8-static", max_shard_bytes=SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_json", _failing_for("model.safetensors.index.json", write_json))
        with pytest.raises(CheckpointError, match="No space left"):
            run(llama, tmp_path / "out", "fp8-static", max_shard_bytes=SMALL)
    assert not (tmp_path / "out/config.json").exists()
    run(llama, tmp_path / "out", "fp8-static", max_shard_bytes=SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _failing_for(name: str, write: Callable[[Path, Any], None]) -> Callable[[Path, Any], None]:
    def failing(path: Path, value: Any) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, value)

    return failing


def test_a_full_disk_loses_nothing_that_is_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file and the way on; once there is room the same command ends in the same bytes."""
    run(llama, tmp_path / "whole", "fp8-static", max_shard_bytes=SMALL)
    written: list[Path] = []

    def filling(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(written) == 5:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "save_file", filling)
        with pytest.raises(CheckpointError, match="No space left on device") as raised:
            run(llama, tmp_path / "out", "fp8-static", max_shard_bytes=SMALL)
    assert "run the same command again" in raised.value.fix
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["layers_done"] > 0
    run(llama, tmp_path / "out", "fp8-static", max_shard_bytes=SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_result_does_not_depend_on_the_size_of_shards(llama: Path, tmp_path: Path) -> None:
    """Each shard is within its size, or holds one tensor; all tensors are the same."""
    manifest = run(llama, tmp_path / "small", "fp8-static", max_shard_bytes=SMALL)
    run(llama, tmp_path / "large", "fp8-static")
    assert len(manifest.shards) > LAYERS
    assert all(shard.tensor_bytes <= SMALL or len(shard.tensors) == 1 for shard in manifest.shards)
    small, large = tensors_of(tmp_path / "small"), tensors_of(tmp_path / "large")
    assert small.keys() == large.keys()
    assert all(small[name].float().equal(large[name].float()) for name in small)


@pytest.mark.parametrize("recipe", ["fp8-static", "awq"])
def test_no_more_than_one_layer_is_held(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """When a part of the model is built, those before it are gone, and it holds a layer or the embedding, never both."""
    built, sizes = list[weakref.ref[Any]](), list[int]()
    build = LayerStack._built

    def watched(self: LayerStack, part: range, *, outer: bool) -> Any:
        assert not any(each() is not None for each in built)
        model = build(self, part, outer=outer)
        built.append(weakref.ref(model))
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    monkeypatch.setattr(LayerStack, "_built", watched)
    run(llama, tmp_path / "out", recipe)
    state = random_llama().state_dict()
    layer = sum(tensor.numel() for name, tensor in state.items() if ".layers.0." in name) + 2  # the scales of K and V
    assert sizes == [state["model.embed_tokens.weight"].numel(), *[layer] * LAYERS]


def test_activations_are_kept_only_as_long_as_they_are_needed(llama: Path, partial: Path) -> None:
    """A partial folder has those behind its last layer alone, a finished one none."""
    kept = [path.name for path in (partial / ".paddock-work").iterdir() if path.name.startswith("activations")]
    assert kept == [f"activations-{json.loads((partial / MANIFEST).read_text())['layers_done']:05}"]
    run(llama, partial, "fp8-static", max_shard_bytes=SMALL)
    assert not (partial / ".paddock-work").exists()


def test_a_finished_folder_is_a_model_that_says_what_it_was_made_from(llama: Path, tmp_path: Path) -> None:
    """Tokenizer and generation_config.json are there, nothing of the work is, and the manifest has each file's digest."""
    manifest = run(llama, tmp_path / "out", "fp8-static")
    assert {path.name for path in llama.iterdir()} - {"model.safetensors"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert manifest.made_from["calibration"]["samples"] == SAMPLES
    assert manifest.made_from["calibration"]["sequence_length"] == LENGTH
    assert manifest.made_from["calibration"]["bytes"] == len(TEXT)
    assert manifest.made_from["versions"].keys() >= {"paddock", "paddock-quant-fp8", "torch"}
    for shard in manifest.shards:
        assert (tmp_path / "out" / shard.file.name).stat().st_size == shard.file.nbytes
        assert folders._sha256(tmp_path / "out" / shard.file.name) == shard.file.sha256
    modes = {(tmp_path / "out" / name).stat().st_mode for name in (MANIFEST, *(shard.file.name for shard in manifest.shards))}
    assert len(modes) == 1


@pytest.fixture
def partial(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose run was stopped at the last layer."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, LAYERS - 1)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", "fp8-static", max_shard_bytes=SMALL)
    return tmp_path / "out"


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_a_partial_folder_is_no_model_yet(partial: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Who names it as one is told that quantising it has not ended, and how to go on."""
    assert main([command, str(partial), *(["a"] if command == "generate" else [])]) == 1
    shown = capsys.readouterr().err
    assert "paddock quantize has not finished it" in shown
    assert "run the same paddock quantize command again" in shown


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "fp8-dynamic"}, "recipe: was 'fp8-static', is now 'fp8-dynamic'"),
        ({"samples": 5}, "calibration.samples: was 6, is now 5"),
        ({"sequence_length": 20}, "calibration.sequence_length: was 24, is now 20"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: was None, is now 'fp8'"),
        ({"calibration": "default"}, "calibration.sha256: was "),
        ({"max_shard_bytes": SMALL + 1}, "max_shard_bytes: was 60000, is now 60001"),
    ],
)
def test_a_changed_option_refuses_to_resume_and_says_why(llama: Path, partial: Path, changes: dict[str, Any], says: str) -> None:
    """And the partial folder is left as it is."""
    before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    options: dict[str, Any] = {"recipe": "fp8-static", "max_shard_bytes": SMALL} | changes
    with pytest.raises(OptionError, match="cannot be resumed") as raised:
        run(llama, partial, **options)
    assert says in raised.value.message
    assert {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()} == before


def test_a_changed_source_refuses_to_resume(tmp_path: Path) -> None:
    """Weights of the same names and shapes, written anew, are another source."""
    source = write_model(tmp_path / "plain/llama", random_llama())
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "fp8-dynamic", max_shard_bytes=SMALL)
    save_file({name: tensor * 2 for name, tensor in random_llama().state_dict().items()}, source / "model.safetensors")
    with pytest.raises(OptionError, match=r"source\.fingerprint: was"):
        run(source, tmp_path / "out", "fp8-dynamic", max_shard_bytes=SMALL)


@pytest.mark.parametrize("what", ["shard-00001.safetensors", "activations-*"])
def test_damage_to_what_was_kept_is_found(llama: Path, partial: Path, what: str) -> None:
    """One flipped byte in a shard or in the kept activations is an error that names the file."""
    (path,) = (partial / ".paddock-work").glob(what)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was written before") as raised:
        run(llama, partial, "fp8-static", max_shard_bytes=SMALL)
    assert path.name in raised.value.message


def test_a_finished_folder_is_not_written_again(llama: Path, tmp_path: Path) -> None:
    """A second run into it is refused, whatever its options."""
    run(llama, tmp_path / "out", "fp8-dynamic")
    before = contents(tmp_path / "out")
    with pytest.raises(OptionError, match="holds a quantised model already"):
        run(llama, tmp_path / "out", "fp8-dynamic")
    assert contents(tmp_path / "out") == before


def test_a_folder_with_anything_else_in_it_is_refused(llama: Path, tmp_path: Path) -> None:
    """The source itself, too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"not empty: it holds 'notes\.txt'"):
        run(llama, tmp_path / "out", "fp8-dynamic")
    with pytest.raises(OptionError, match="not empty"):
        run(llama, llama, "fp8-dynamic")
    assert (llama / "model.safetensors").exists()


def test_a_folder_another_run_writes_is_refused(llama: Path, partial: Path) -> None:
    """Two runs would overwrite each other's shards; once the other has ended, this one goes on."""
    made_from = json.loads((partial / MANIFEST).read_text())["made_from"]
    with folders.OutputFolder.opened(partial, made_from), pytest.raises(OptionError, match="another run is writing"):
        run(llama, partial, "fp8-static", max_shard_bytes=SMALL)
    assert run(llama, partial, "fp8-static", max_shard_bytes=SMALL).status == "complete"


def test_a_run_stopped_before_its_manifest_was_written_leaves_nothing_in_the_way(llama: Path, tmp_path: Path) -> None:
    """A folder with nothing but the beginnings of a run counts as empty."""
    (tmp_path / "out/.paddock-work").mkdir(parents=True)
    (tmp_path / "out" / f"{MANIFEST}.new").write_text("{")
    assert run(llama, tmp_path / "out", "fp8-dynamic").status == "complete"


def test_a_folder_that_cannot_be_made_is_an_error(llama: Path, tmp_path: Path) -> None:
    """Its place is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PaddockError, match="file"):
        run(llama, tmp_path / "file/out", "fp8-dynamic")


def test_a_run_keeps_its_folder_until_it_has_ended(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate may take long: another run must not begin in what is a whole model meanwhile."""
    said: list[str] = []

    def measure(folder: str, *_: Any, **__: Any) -> dict[str, float]:
        if folder != str(llama):
            with pytest.raises(OptionError) as refused:
                run(llama, tmp_path / "out", "fp8-official", gate=1.0)
            said.append(refused.value.message)
        return {"tokens": 10, "nats": 1.0, "perplexity": 10.0}

    monkeypatch.setattr("paddock.quantize.gate.measure", measure)
    run(llama, tmp_path / "out", "fp8-official", gate=1.0)
    assert said == [f"out is {str(tmp_path / 'out')!r}, which another run is writing"]
    assert not (tmp_path / "out/.paddock-work").exists()


def test_a_run_that_ended_in_the_last_moment_is_not_begun_anew(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever another run wrote until the folder was ours counts."""
    alone = folders._alone

    def late(path: Path) -> AbstractContextManager[None]:
        monkeypatch.setattr(folders, "_alone", alone)
        run(llama, path, "fp8-official")
        (path / ".paddock-work").mkdir()
        return alone(path)

    monkeypatch.setattr(folders, "_alone", late)
    with pytest.raises(OptionError, match=r"holds a quantised model already \(complete\)"):
        run(llama, tmp_path / "out", "fp8-official")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["status"] == "complete"


def test_a_folder_that_cannot_be_locked_is_an_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CheckpointError, match="cannot be locked against other runs: No locks available"):
        run(llama, tmp_path / "out", "fp8-official")


@pytest.mark.parametrize("change", [{"status": "done"}, {"activations": {"name": "../a", "nbytes": 1, "sha256": "0"}}])
def test_a_manifest_that_nothing_here_wrote_is_refused(llama: Path, partial: Path, change: dict[str, Any]) -> None:
    """A status nobody knows, a file outside the folder."""
    write_json(partial / MANIFEST, json.loads((partial / MANIFEST).read_text()) | change)
    with pytest.raises(CheckpointError, match="is no manifest of paddock quantize"):
        run(llama, partial, "fp8-static")


def test_a_file_that_is_too_large_to_copy_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever misses it finds it in the log."""
    monkeypatch.setattr(folders, "_SMALL_BYTES", 40)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/large.txt").write_text("x" * 41)
    (tmp_path / "source/small.txt").write_text("x")
    assert [path.name for path in folders._small_files(tmp_path / "source")] == ["small.txt"]
    assert "file_not_copied" in "".join(capsys.readouterr())
