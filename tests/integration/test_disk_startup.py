"""The benchmark of start-up from disk, on tiny models: what it writes is a checkpoint, and what it cannot do it says first."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from torch import Tensor

from paddock import LLM, SamplingParams
from paddock.checkpoint.source import open_source
from paddock.errors import CheckpointError, OptionError, PaddockError
from tests.bench import disk_startup, page_cache
from tests.bench.disk_checkpoint import MARKER, check_room, described, finish, is_written, with_layers, write_weights
from tests.integration.test_bench_startup import CONFIG

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "hidden_act": "silu"}
FP8 = PLAIN | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}}
INT4 = PLAIN | {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD_BYTES = 100_000


@pytest.fixture
def _imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmark's processes be children of one that has imported torch, and not each import it again."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "paddock.assemble", "tests.bench.disk_startup"])
    monkeypatch.setattr(disk_startup, "get_context", lambda _: context)


imports_once = pytest.mark.usefixtures("_imported_once")


def folder_of(config: dict[str, Any], folder: Path) -> str:
    """Return a folder with that config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def written(config: dict[str, Any], tmp_path: Path) -> Path:
    """Return a folder with the checkpoint that a config describes."""
    checkpoint = described(with_layers(folder_of(config, tmp_path / "config"), None), SHARD_BYTES)
    write_weights(checkpoint, tmp_path / "model", CPU)
    finish(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, as safetensors reads them, by its index."""
    found = {}
    for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


def run(model: str, *words: str) -> Result:
    """Return what the benchmark gives on a CPU, in weight files of about 100 kB."""
    return CliRunner().invoke(disk_startup.main, [model, "--device", "cpu", "--shard-gib", "0.0001", *words])


def lines_of(result: Result) -> list[dict[str, Any]]:
    """Return the JSON objects of a run that did its work."""
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("config", [PLAIN, FP8, INT4], ids=["plain", "fp8", "int4"])
def test_what_is_written_loads_strictly(config: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is missing and nothing left over: a model of it gives a token."""
    folder = written(config, tmp_path)
    with LLM(str(folder), load_format="safetensors", tokenizer="none", device="cpu") as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, ignore_eos=True), progress=False)
    assert len(output.outputs[0].token_ids) == 1


def test_a_plain_checkpoint_is_what_transformers_would_save(tmp_path: Path) -> None:
    """Names and shapes are those of its model; values are small, finite and not all alike."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{name: value for name, value in PLAIN.items() if name != "architectures"})
    reference = transformers.LlamaForCausalLM(config).state_dict()
    found = tensors_in(written(PLAIN, tmp_path))
    assert {name: each.shape for name, each in found.items()} == {name: each.shape for name, each in reference.items()}
    assert {each.dtype for each in found.values()} == {torch.bfloat16}
    assert all(each.isfinite().all() and 0 < each.float().std() < 1 for each in found.values())
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], found["model.layers.1.mlp.up_proj.weight"])


def test_an_fp8_checkpoint_has_finite_values_and_positive_scales(tmp_path: Path) -> None:
    """Each linear of a layer has a weight in FP8 and two scalars; the head is plain."""
    found = tensors_in(written(FP8, tmp_path))
    scales = [name for name in found if name.endswith("_scale")]
    assert len(scales) == 2 * len(LINEARS) * PLAIN["num_hidden_layers"]
    assert all(found[name].shape == () and 0 < found[name] < 1 and found[name].dtype == torch.float32 for name in scales)
    weights = [found[name.removesuffix("_scale")] for name in scales if name.endswith("weight_scale")]
    assert all(each.dtype == torch.float8_e4m3fn and each.float().isfinite().all() for each in weights)
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_files_end_where_the_next_tensor_would_not_fit(tmp_path: Path) -> None:
    """No file holds more than was asked, and neighbours would not fit into one."""
    folder = written(PLAIN, tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    sizes = [file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert len(files) > 2
    assert max(sizes) <= SHARD_BYTES
    assert all(one + other > SHARD_BYTES for one, other in pairwise(sizes))


def test_each_start_is_measured_and_the_files_are_removed(tmp_path: Path) -> None:
    """A line a start, medians of them, the disk's speed; nothing is left behind."""
    model, folder = folder_of(FP8 | {"num_hidden_layers": 4}, tmp_path / "config"), tmp_path / "model"
    first, second, report = lines_of(run(model, "--dir", str(folder), "--layers", "2", "--runs", "2", "--commit", "here"))
    assert [first["run"], second["run"]] == [1, 2]
    assert 0 < first["weights_seconds"] < first["accepted_seconds"] < first["first_token_seconds"]
    assert first["load_seconds"] is not None
    assert report["accepted_seconds"] == pytest.approx((first["accepted_seconds"] + second["accepted_seconds"]) / 2)
    assert report["disk_gb_per_s"] > 0
    assert report["write_gb_per_s"] > 0
    assert report["tensors"] == 2 * (2 + 3 * len(LINEARS)) + 3
    assert report["plan"]["quantization"] == "modelopt"
    assert report["commit"] == "here"
    assert list(folder.iterdir()) == []


@imports_once
def test_a_kept_checkpoint_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run takes the files of the first, and without --keep removes them."""
    model, folder = folder_of(PLAIN, tmp_path / "config"), tmp_path / "model"
    *_, report = lines_of(run(model, "--dir", str(folder), "--keep"))
    assert report["write_gb_per_s"] is not None
    assert is_written(described(with_layers(model, None), SHARD_BYTES), folder)
    monkeypatch.setattr(disk_startup, "write", None)
    *_, report = lines_of(run(model, "--dir", str(folder)))
    assert report["write_gb_per_s"] is None
    assert list(folder.iterdir()) == []


@imports_once
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    """Another's files, the checkpoint of another config, and files of the wrong size are refused, and stay as they are."""
    folder = written(PLAIN, tmp_path)
    model = str(tmp_path / "config")
    other = folder_of(PLAIN | {"vocab_size": 80}, tmp_path / "other")
    for words, said in (((other, "--dir", str(folder)), "another config"), ((model, "--dir", other), "holds 'config.json'")):
        result = run(*words)
        assert result.exit_code == 1
        assert said in result.output
        assert "fix: name a new folder with --dir" in result.output
    os.truncate(next(folder.glob("model-00002*")), 1000)
    assert "has 1,000 bytes" in run(model, "--dir", str(folder)).output
    assert (folder / MARKER).exists()
    assert (tmp_path / "other" / "config.json").exists()
    assert "Not a directory" in run(model, "--dir", f"{other}/config.json").output


@imports_once
def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes wanted, the bytes free and the way out."""
    model, folder = folder_of(PLAIN, tmp_path / "config"), tmp_path / "deep" / "model"
    checkpoint = described(with_layers(model, None), SHARD_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=checkpoint.nbytes - 1))
    with pytest.raises(OptionError, match=f"{checkpoint.nbytes:,} bytes.* has {checkpoint.nbytes - 1:,} free") as caught:
        check_room(checkpoint, folder)
    assert "--layers" in caught.value.fix
    assert "--dir" in caught.value.fix
    assert "free" in run(model, "--dir", str(folder)).output
    assert not folder.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=checkpoint.nbytes))
    check_room(checkpoint, folder)


@imports_once
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layers", "3"), "--layers is 3, and the model has 2"),
        (("--load-format", "dummy"), "--load-format is dummy"),
        (("--max-model-len", "4000"), "max_model_len is 4000"),
        (("--tp", "2"), "tensor_parallel_size"),
        (("--kv-cache-memory-bytes", "1"), "kv_cache_memory_bytes"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(words: Sequence[str], said: str, tmp_path: Path) -> None:
    """Options that no engine takes leave no files."""
    model, folder = folder_of(PLAIN, tmp_path / "config"), tmp_path / "model"
    result = run(model, "--dir", str(folder), *words)
    assert result.exit_code == 1
    assert said in result.output
    assert not folder.exists()


@imports_once
def test_writing_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when it is stopped at its last step."""
    model, folder = folder_of(PLAIN, tmp_path / "config"), tmp_path / "model"

    def stopped(*_: object) -> None:
        assert any(folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_startup, "finish", stopped)
    assert run(model, "--dir", str(folder)).exit_code == 1
    assert list(folder.iterdir()) == []


def killed_on_the_way(model: str, layers: int | None, shard_bytes: int, folder: Path, _: object) -> None:
    """Write the weights, and be killed before saying so."""
    write_weights(described(with_layers(model, layers), shard_bytes), folder, CPU)
    os.kill(os.getpid(), signal.SIGKILL)


@imports_once
def test_a_writer_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does where memory runs out: said with a way out."""
    model, folder = folder_of(PLAIN, tmp_path / "config"), tmp_path / "model"
    monkeypatch.setattr(disk_startup, "write", killed_on_the_way)
    assert "was killed" in run(model, "--dir", str(folder)).output
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the folder and the way out."""
    checkpoint = described(with_layers(folder_of(PLAIN, tmp_path / "config"), None), SHARD_BYTES)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write_weights(checkpoint, tmp_path / "model", CPU)
    assert "--dir" in caught.value.fix


def test_weight_files_alone_are_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    """As a killed run leaves them: they are no model, and the next run refuses them."""
    checkpoint = described(with_layers(folder_of(PLAIN, tmp_path / "config"), None), SHARD_BYTES)
    write_weights(checkpoint, tmp_path / "model", CPU)
    with pytest.raises(OptionError, match="no finished checkpoint"):
        is_written(checkpoint, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_source(str(tmp_path / "model"))


def test_evicted_files_leave_the_page_cache(tmp_path: Path) -> None:
    """What was just read lies in it whole, and after eviction none of it does."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_001))
    assert file.read_bytes()
    assert page_cache.cached_bytes([file, file]) == 2 * 3_000_001
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if page_cache.cached_bytes([file]) == 3_000_001:
        pytest.skip("this file system keeps its files in memory")
    assert file.read_bytes()
    page_cache.evict([file])
    assert page_cache.cached_bytes([file]) == 0


def test_the_disks_speed_is_of_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the page cache, and through it where the file system refuses that; a short read is an error."""
    monkeypatch.setattr(page_cache, "BLOCK_BYTES", 1 << 20)
    files = [tmp_path / "one", tmp_path / "other"]
    for file in files:
        file.write_bytes(os.urandom(5_000_001))
    found = page_cache.disk_speed(files)
    assert found.nbytes == 10_000_002
    assert found.gb_per_s == pytest.approx(found.nbytes / found.seconds / 1e9)
    opened = os.open

    def without_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags)

    monkeypatch.setattr(os, "open", without_direct)
    found = page_cache.disk_speed(files)
    assert found.how == page_cache.EVICTED
    monkeypatch.setattr(os, "preadv", lambda *_: 1000)
    with pytest.raises(PaddockError, match="10,000 bytes of 10,000,002"):
        page_cache.disk_speed(files)
