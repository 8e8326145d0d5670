"""Loading: every tensor used once, every parameter filled once, every misfit said at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from paddock.checkpoint import reading
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.load import load
from paddock.checkpoint.matching import Match
from paddock.checkpoint.targets import RowQuantiser, Target
from paddock.errors import CheckpointError

TENSORS = {"w": torch.arange(12.0).view(3, 4), "b": torch.arange(4.0), "s": torch.tensor(7.0)}


def whole(name: str, view: Tensor, *, optional: bool = False, aliases: tuple[str, ...] = ()) -> Target:
    """Return a target that takes all of a tensor of the view's shape."""
    shape = tuple(view.shape)
    return Target(name=name, view=view, shape=shape, region=tuple((0, n) for n in shape), optional=optional, aliases=aliases)


def wanted(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return parameters for all of TENSORS, filled with NaN."""
    return {name: torch.full(tensor.shape, torch.nan, dtype=dtype) for name, tensor in TENSORS.items()}


def folder_with(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint and return its folder."""
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def refusal(folder: Path, targets: Iterable[Target], ignored_suffixes: tuple[str, ...] = ()) -> str:
    """Return the message of the error that loading ends in."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, targets, ignored_suffixes=ignored_suffixes)
    return caught.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_parameter_is_filled_and_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    """Floats come out as torch converts them, scalars included."""
    parameters = wanted(dtype)
    load(folder_with(tmp_path, TENSORS), [whole(name, view) for name, view in parameters.items()])
    assert all(torch.equal(parameters[name], TENSORS[name].to(dtype)) for name in TENSORS)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16],
)
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is stored in the parameter's own dtype arrives unchanged."""
    stored = (torch.arange(15) % 2).to(dtype).view(5, 3)
    view = torch.empty_like(stored)
    load(folder_with(tmp_path, {"w": stored}), [whole("w", view)])
    assert torch.equal(view.view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [True, False])
def test_parameters_are_filled_in_whichever_mode_they_were_made(tmp_path: Path, dtype: torch.dtype, *, inference: bool) -> None:
    """Readers are threads of their own, which the caller's inference mode does not reach; what they fill stays what it was."""
    folder = folder_with(tmp_path, TENSORS)
    with torch.inference_mode(inference):
        parameters = wanted(dtype)
        load(folder, [whole(name, view) for name, view in parameters.items()])
    assert all(torch.equal(parameters[name], TENSORS[name].to(dtype)) for name in TENSORS)
    assert all(view.is_inference() == inference for view in parameters.values())


def test_narrower_integers_widen_and_wider_ones_do_not_narrow(tmp_path: Path) -> None:
    """Tools store sizes (compressed-tensors' weight_shape) in either."""
    folder, view = (
        folder_with(tmp_path, {"w": torch.tensor([-3, 2**31 - 1], dtype=torch.int32)}),
        torch.zeros(2, dtype=torch.int64),
    )
    load(folder, [whole("w", view)])
    assert view.tolist() == [-3, 2**31 - 1]
    folder = folder_with(tmp_path, {"w": torch.ones(2, dtype=torch.int64)})
    assert "'w': is I64" in refusal(folder, [whole("w", torch.zeros(2, dtype=torch.int32))])


def test_all_misfits_are_in_one_error_and_nothing_is_written(tmp_path: Path) -> None:
    """Missing, unexpected, mis-shaped and wrongly typed tensors are listed together, before any parameter is touched."""
    stored = {"b": torch.ones(4), "wide": torch.ones(2, 5), "ints": torch.ones(3, dtype=torch.int32), "extra": torch.ones(1)}
    parameters = {"b": torch.zeros(4), "wide": torch.zeros(2, 4), "ints": torch.zeros(3), "gone": torch.zeros(2)}
    message = refusal(folder_with(tmp_path, stored), [whole(name, view) for name, view in parameters.items()])
    assert "4 of its tensors" in message
    assert "'gone': missing; the model wants F32 [2]" in message
    assert "'extra': unexpected" in message
    assert "'wide': has shape [2, 5]; the model wants F32 [2, 4]" in message
    assert "'ints': is I32, of shape [3]; the model wants F32 [3]" in message
    assert not parameters["b"].any()


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    """Twenty are listed in order and the rest is counted."""
    stored = {f"t{i:03}": torch.ones(1) for i in range(123)}
    message = refusal(folder_with(tmp_path, stored), [])
    assert message.count("unexpected") == 20
    assert message.index("'t000'") < message.index("'t019'")
    assert "and 103 more" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_eight_bit_floats_never_convert(tmp_path: Path, dtype: torch.dtype) -> None:
    """FP8 numbers mean nothing without their scale, so a plain parameter, or one of another FP8 layout, refuses them."""
    folder = folder_with(tmp_path, {"w": torch.ones(4).to(dtype)})
    assert "'w': is F8_" in refusal(folder, [whole("w", torch.zeros(4))])
    other = torch.float8_e4m3fn if dtype != torch.float8_e4m3fn else torch.float8_e5m2
    assert "'w': is F8_" in refusal(folder, [whole("w", torch.zeros(4).to(other))])


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    """A weight that would become infinite is named, with the dtypes that can hold it."""
    folder = folder_with(tmp_path, {"w": torch.tensor([1.0, 1e6], dtype=torch.bfloat16)})
    assert "w holds values that float16 cannot" in refusal(folder, [whole("w", torch.zeros(2, dtype=torch.float16))])


def test_ignored_tensors_may_be_left_over(tmp_path: Path) -> None:
    """A suffix or a whole name excuses a tensor nobody takes; others stay unexpected."""
    stored = {"w": torch.ones(1), "lm_head.weight": torch.ones(1), "l.0.rotary_emb.inv_freq": torch.ones(1)}
    targets = [whole("w", torch.zeros(1))]
    load(folder_with(tmp_path, stored), targets, ignored_suffixes=(".inv_freq", "lm_head.weight"))
    assert "inv_freq" in refusal(tmp_path, targets, ignored_suffixes=("lm_head.weight",))


def test_an_optional_tensor_may_be_absent(tmp_path: Path) -> None:
    """Its parameter keeps what it holds."""
    view, kept = torch.zeros(4), torch.full((2,), 5.0)
    load(folder_with(tmp_path, {"b": TENSORS["b"]}), [whole("b", view), whole("scale", kept, optional=True)])
    assert kept.tolist() == [5.0, 5.0]
    assert torch.equal(view, TENSORS["b"])


@pytest.mark.parametrize("names", [("embed",), ("lm_head",), ("embed", "lm_head")])
def test_a_tied_table_is_taken_under_either_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Whichever name a saver chose, or both, one parameter is filled; a copy of another shape is an error."""
    view = torch.zeros(3)
    load(folder_with(tmp_path, {name: torch.ones(3) for name in names}), [whole("embed", view, aliases=("lm_head",))])
    assert view.tolist() == [1.0, 1.0, 1.0]


def test_a_copy_of_another_shape_is_an_error(tmp_path: Path) -> None:
    """A second name excuses a copy, not another tensor."""
    folder = folder_with(tmp_path, {"embed": torch.ones(3), "lm_head": torch.ones(4)})
    assert "'lm_head': has shape [4]" in refusal(folder, [whole("embed", torch.zeros(3), aliases=("lm_head",))])


def test_a_tensor_two_parameters_want_is_an_error(tmp_path: Path) -> None:
    """Each tensor is used once."""
    folder = folder_with(tmp_path, {"w": torch.ones(3)})
    assert "'w': two parameters want it" in refusal(folder, [whole("w", torch.zeros(3)), whole("w", torch.zeros(3))])


@pytest.mark.parametrize(("stored", "want"), [((1,), ()), ((), (1,)), ((4, 1), (4,)), ((4,), (4, 1))])
def test_axes_of_one_element_may_come_and_go(tmp_path: Path, stored: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Savers differ in whether a scale is [] or [1], [out] or [out, 1]; the bytes are the same."""
    view, values = torch.zeros(want), torch.arange(1.0, 1 + torch.Size(stored).numel())
    load(folder_with(tmp_path, {"scale": values.reshape(stored)}), [whole("scale", view)])
    assert view.flatten().tolist() == values.tolist()


def test_an_empty_tensor_is_loaded(tmp_path: Path) -> None:
    """A tensor without elements is legal and nothing is read for it."""
    folder, view = folder_with(tmp_path, {"none": torch.empty(0, 5), "w": torch.ones(1)}), torch.zeros(1)
    load(folder, [whole("none", torch.empty(0, 5)), whole("w", view)])
    assert view.item() == 1.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_region_of_any_shape_arrives_in_place(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A region, cut in pieces of any size, converted or not, into a contiguous view or not, equals the slice of the whole."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    region = tuple((start, data.draw(st.integers(start + 1, n))) for start, n in zip(starts, shape, strict=True))
    stored = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    sizes = [stop - start for start, stop in region]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    around = torch.full([*sizes[:-1], sizes[-1] + data.draw(st.integers(0, 1))], torch.nan, dtype=dtype)
    view = around[..., : sizes[-1]]
    folder = folder_with(tmp_path_factory.mktemp("region"), {"w": stored})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_BYTES", data.draw(st.sampled_from([1, 4, 16, 100, 4096])))
        load(folder, [Target(name="w", view=view, shape=shape, region=region)])
    assert torch.equal(view, stored[tuple(slice(*span) for span in region)].to(dtype))


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    """The callback sees nothing, then more and more, then everything."""
    seen: list[tuple[int, int]] = []
    targets = [whole(name, view) for name, view in wanted().items()]
    load(folder_with(tmp_path, TENSORS), targets, progress=lambda done, total: seen.append((done, total)))
    total = 4 * (12 + 4 + 1)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """The end of the file in the middle of a tensor is a checkpoint error, not a hang or a half-filled parameter."""
    path = folder_with(tmp_path, {"w": torch.ones(8)}) / "model.safetensors"
    gone = StoredTensor(name="w", file=path, dtype="F32", shape=(8,), start=path.stat().st_size - 8, nbytes=32)
    with pytest.raises(CheckpointError, match="shorter"):
        reading.read([Match(gone, whole("w", torch.zeros(8)))], None)


def tenths(rows_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers and scales a tenth of the rows' largest values."""
    scale_R1 = rows_RI.amax(1, keepdim=True) / 10
    return (rows_RI / scale_R1).round().to(torch.int8), scale_R1


def quantising(view: Tensor, scales: Tensor, region: tuple[tuple[int, int], ...], seen: list[Tensor]) -> Target:
    """Return a target that quantises a region of `w` [64, 6] and notes what it is given."""

    def convert(rows_RI: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(rows_RI.clone())
        return tenths(rows_RI)

    return Target(
        name="w", view=view, shape=(64, 6), region=region, rows=RowQuantiser(convert=convert, scales=scales, dtype="bfloat16")
    )


@pytest.mark.parametrize("region", [((0, 64), (0, 6)), ((10, 33), (0, 6)), ((0, 64), (3, 6)), ((63, 64), (2, 4))])
@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_rows_are_quantised_whole_and_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, region: tuple[tuple[int, int], ...], piece: int
) -> None:
    """Values and scales are those of whole rows, whichever part of them is kept and however little is read at a time."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece)
    weight = torch.rand(64, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    (first, last), (left, right) = region
    view, scales = torch.zeros(last - first, right - left, dtype=torch.int8), torch.zeros(last - first, 1)
    seen: list[Tensor] = []
    load(folder_with(tmp_path, {"w": weight}), [quantising(view, scales, region, seen)])
    values, expected = tenths(weight)
    assert torch.equal(view, values[first:last, left:right])
    assert torch.equal(scales, expected[first:last])
    assert all(rows.shape[1] == 6 and rows.nbytes <= max(piece, 24) for rows in seen)


def test_only_floats_are_quantised(tmp_path: Path) -> None:
    """A stored tensor that is quantised already cannot be read as a plain one."""
    target = quantising(torch.zeros(64, 6, dtype=torch.int8), torch.zeros(64, 1), ((0, 64), (0, 6)), [])
    said = refusal(folder_with(tmp_path, {"w": torch.zeros(64, 6, dtype=torch.int8)}), [target])
    assert "'w': is I8, of shape [64, 6]; the model wants BF16 [64, 6]" in said
