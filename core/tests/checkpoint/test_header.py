"""safetensors headers: what is sound is read, what is not is named, and nothing else ever happens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from paddock.checkpoint.header import read_header
from paddock.checkpoint.problems import Problems
from paddock.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
    "none": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [25, 25]},
}


def encode(header: Any, data: bytes = bytes(25)) -> bytes:
    """Return a safetensors file with that header, given as JSON text or as what to write as JSON."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def complaints(file: bytes) -> str:
    """Return what is said about a file, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(file)
        problems = Problems()
        read_header(path, problems)
        try:
            problems.refuse("unsound", fix="none")
        except CheckpointError as error:
            return error.message
        return ""


def test_every_tensor_is_found_where_it_lies(tmp_path: Path) -> None:
    """Names, dtypes, shapes and absolute positions come out as they were written, scalars and empty tensors included."""
    path, problems = tmp_path / "model.safetensors", Problems()
    path.write_bytes(encode({"__metadata__": {"format": "pt"}, **GOOD}))
    found = read_header(path, problems)
    assert not problems
    base = path.stat().st_size - 25
    assert [(t.name, t.dtype, t.shape, t.start - base, t.nbytes) for t in found.values()] == [
        ("a", "F32", (2, 3), 0, 24),
        ("b", "U8", (), 24, 1),
        ("none", "BF16", (0, 7), 25, 0),
    ]


def test_trailing_spaces_after_the_header_are_allowed() -> None:
    """Writers pad the header to align the data."""
    assert complaints(encode(json.dumps(GOOD).encode() + b"   ")) == ""


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.int64])
def test_what_the_safetensors_library_writes_is_sound(dtype: torch.dtype) -> None:
    """Files by the reference writer raise no complaint."""
    assert complaints(save({"x": torch.zeros(3, 5).to(dtype), "y": torch.zeros(()).to(dtype)})) == ""


def changed(name: str, **fields: Any) -> dict[str, Any]:
    """Return the good header with some fields of one tensor replaced."""
    return {**GOOD, name: {**GOOD[name], **fields}}


BAD = {
    "empty file": (b"", "too few"),
    "seven bytes": (bytes(7), "too few"),
    "only a length": ((40).to_bytes(8, "little"), "truncated"),
    "oversized header": ((100_000_001).to_bytes(8, "little") + b"{}", "claims 100,000,001 bytes"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "`git lfs pull`"),
    "negative length": (b"\xff" * 8 + b"{}", "claims 18,446,744,073,709,551,615 bytes"),
    "header longer than file": ((64).to_bytes(8, "little") + b"{}", "truncated"),
    "truncated data": (encode(GOOD, bytes(24)), "1 bytes of tensor data are missing"),
    "trailing data": (encode(GOOD, bytes(28)), "3 bytes after the last tensor"),
    "not JSON": (encode(b"{'a': 1}"), "not a valid JSON object"),
    "leading space": (encode(b" {}", b""), "does not begin with {"),
    "not an object": (encode([1]), "does not begin with {"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "not a valid JSON object"),
    "deep nesting": (encode(b'{"a":' + b"[" * 200_000), "not a valid JSON object"),
    "endless number": (encode(b'{"a":' + b"9" * 5000 + b"}"), "not a valid JSON object"),
    "duplicate key": (encode(b'{"a": 1, "a": 1}'), "'a' appears twice"),
    "duplicate inner key": (encode(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "'dtype' appears twice"),
    "metadata of numbers": (encode({"__metadata__": {"n": 1}, **GOOD}), "__metadata__"),
    "entry of no object": (encode({**GOOD, "b": 3}), "'b': its entry must have exactly"),
    "entry with more keys": (encode(changed("b", stride=1)), "'b': its entry must have exactly"),
    "unknown dtype": (encode(changed("a", dtype="F31")), "'a': dtype 'F31' is unknown"),
    "dtype of another type": (encode(changed("a", dtype=[1])), "dtype [1] is unknown"),
    "negative shape": (encode(changed("a", shape=[-2, -3])), "shape [-2, -3]"),
    "fractional shape": (encode(changed("a", shape=[2.0, 3])), "shape [2.0, 3]"),
    "boolean shape": (encode(changed("b", shape=[True])), "shape [True]"),
    "huge shape": (encode(changed("a", shape=[1 << 62, 1 << 62])), "more than any file can hold"),
    "shape that wraps to fit": (encode(changed("a", shape=[1 << 32, 1 << 32, 6])), "more than any file can hold"),
    "shape of a thousand axes": (encode(changed("a", shape=[1] * 1000)), "at most 64"),
    "shape that does not fit": (encode(changed("a", shape=[2, 2])), "takes 16 bytes, its data_offsets span 24"),
    "half a byte": (encode({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)), "whole byte"),
    "backward offsets": (encode(changed("a", data_offsets=[24, 0])), "data_offsets [24, 0]"),
    "three offsets": (encode(changed("a", data_offsets=[0, 12, 24])), "data_offsets [0, 12, 24]"),
    "overlap": (encode(changed("b", data_offsets=[23, 24])), "'b' overlaps"),
    "gap": (encode(changed("b", data_offsets=[25, 26]), bytes(26)), "leaves a gap"),
    "late beginning": (encode({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, bytes(2)), "leaves a gap"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_named_with_its_fault(case: str) -> None:
    """Every way to be malformed that the format forbids is refused, and the message says which one it is."""
    file, message = BAD[case]
    assert "model.safetensors: " in complaints(file)
    assert message in complaints(file)


def test_every_fault_is_said_at_once() -> None:
    """Two bad tensors make one error with both."""
    found = complaints(encode({**changed("a", dtype="F31"), "b": {"dtype": "U8", "shape": [-1], "data_offsets": [24, 25]}}))
    assert "'a'" in found
    assert "'b'" in found


def test_a_name_cannot_write_on_the_terminal() -> None:
    """Control characters, lone surrogates and endless names are escaped and cut before they reach an error message."""
    found = complaints(encode(b'{"\\u001b[2J\\ud800%s": 1}' % (b"x" * 10_000)))
    assert "\x1b" not in found
    found.encode("utf-8")
    assert len(found) < 400


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 1 << 70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "U8", "F4"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {}, optional={"dtype": json_values, "shape": st.lists(st.integers(-2, 9)) | json_values, "data_offsets": json_values}
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), entries | json_values, max_size=4), st.binary(max_size=40))
def test_no_header_ends_in_anything_but_a_complaint(header: dict[str, Any], data: bytes) -> None:
    """Whatever JSON a header holds, it is sound or refused; nothing else is raised."""
    complaints(encode(header, data))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_a_complaint(data: bytes) -> None:
    """Whatever bytes a file holds, it is sound or refused; nothing else is raised."""
    complaints(data)
    complaints(encode(data, b""))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(encode(GOOD)) - 1), st.integers(1, 255))
def test_no_flipped_byte_moves_a_tensor_out_of_the_file(position: int, flip: int) -> None:
    """A damaged header is refused, or its tensors still lie inside the file."""
    file = bytearray(encode(GOOD))
    file[position] ^= flip
    with tempfile.TemporaryDirectory() as folder:
        path, problems = Path(folder) / "model.safetensors", Problems()
        path.write_bytes(file)
        found = read_header(path, problems)
        assert problems or all(0 <= t.start <= t.start + t.nbytes <= len(file) for t in found.values())
