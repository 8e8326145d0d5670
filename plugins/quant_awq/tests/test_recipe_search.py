"""AWQ's searches and where their scales go, on single weights."""

from __future__ import annotations

import pytest
import torch
from plugins.quant_awq.tests.made import weight
from torch import Tensor

from paddock.axes import EMBED, FFN, HEADS, KV_HEADS, Linear, Part, Vector, WeightTable
from paddock.errors import CheckpointError, PluginError
from paddock.quantize.recipe import PlainLinear, PlainVector
from paddock_quant_awq.recipes import search
from paddock_quant_awq.recipes.folding import Folded, shared
from paddock_quant_awq.recipes.groups import Rows, ScaleGroup, scale_groups
from paddock_quant_awq.recipes.rounding import Rounding
from paddock_quant_awq.recipes.seen import SAMPLE_ROWS, SeenInputs

ROUNDING = Rounding(group=32, divisor=7.5, scale_dtype=torch.float32)
EMB = Part("embed", EMBED, 64)


def rows(count: int = 256, inputs: int = 64) -> Tensor:
    """Return inputs, two channels of which are large."""
    x_RI = torch.randn(count, inputs, generator=torch.Generator().manual_seed(7))
    x_RI[:, [3, 40]] *= 30
    return x_RI


def test_candidates_follow_the_formula() -> None:
    """No scale first; then x^a / (w^(1-a) + 1e-4), its largest and least balanced around 1."""
    x_I, w_I = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([0.2, 0.4, 0.3])
    found = list(search.candidates(x_I, w_I))
    assert len(found) == 21
    assert found[0].tolist() == [1, 1, 1]
    raw = x_I**0.25 / (w_I**0.75 + 1e-4)
    torch.testing.assert_close(found[1 + 5], raw / (raw.max() * raw.min()).sqrt())


def test_channels_that_are_never_used_give_finite_scales() -> None:
    """Inputs of zero and weights of zero."""
    for scale_I in search.candidates(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 0.0, 0.2])):
        assert bool((scale_I.isfinite() & (scale_I > 0)).all())


def test_weight_means_are_shares_of_each_group_s_largest() -> None:
    """Over the rows of all weights that share the input."""
    one = torch.tensor([[1.0, 2, -4, 4], [0, 0, 0, 0]])
    other = torch.tensor([[-3.0, 3, 1, 2]])
    expected = torch.tensor([(0.5 + 0 + 1) / 3, (1 + 0 + 1) / 3, (1 + 0 + 0.5) / 3, (1 + 0 + 1) / 3])
    torch.testing.assert_close(search.weight_means([one, other], 2), expected)


def test_the_scale_with_the_least_error_is_taken() -> None:
    """The first of equal ones, and never one worse than no scale."""
    tried = [torch.full((2,), value) for value in (1.0, 3.0, 2.0, 2.5)]
    errors = {1.0: 5.0, 3.0: 4.0, 2.0: 1.0, 2.5: 1.0}
    assert search.best_scale(tried, lambda scale_I: errors[scale_I[0].item()])[0] == 2
    assert search.best_scale(tried, lambda scale_I: float("nan"))[0] == 1


def test_salient_channels_get_larger_scales_and_the_output_error_falls() -> None:
    """The two large channels; the error is less than half of plain rounding's."""
    weight_OI, x_RI = weight(48, 64), rows()

    def error(scale_I: Tensor) -> float:
        return search.output_error(ROUNDING.rounded(weight_OI * scale_I).meaning() / scale_I - weight_OI, x_RI)

    means = x_RI.abs().mean(0), search.weight_means([weight_OI], 32)
    best_I = search.best_scale(search.candidates(*means), error)
    others = torch.ones(64, dtype=torch.bool)
    others[[3, 40]] = False
    assert best_I[[3, 40]].min() > 2 * best_I[others].max()
    assert error(best_I) < error(torch.ones(64)) / 2


def spiked(length: float, columns: slice) -> tuple[Tensor, Tensor]:
    """Return a weight whose group 0 holds one weight of `length` in its first 8 rows, and inputs of zero in these columns."""
    weight_OI, x_RI = weight(48, 64), rows()
    weight_OI[:8, 5] = length
    x_RI[:, columns] = 0
    return weight_OI, x_RI


def test_a_weight_little_above_its_group_is_cut_off() -> None:
    """Ranges fall, and rise, where the output comes nearer to what it was."""
    weight_OI, x_RI = spiked(0.8 * float(weight(48, 64).abs().max()), slice(5, 6))
    parts_OG = search.best_parts(weight_OI, x_RI, ROUNDING)
    assert parts_OG is not None
    assert {round(ROUNDING.steps / part, 3) for part in parts_OG.flatten().tolist()} <= set(search.STEPS)
    assert (parts_OG < 1).sum() > 10
    assert (parts_OG > 1).sum() > 10
    found_OI, plain_OI = ROUNDING.rounded(weight_OI, parts_OG).meaning(), ROUNDING.rounded(weight_OI).meaning()
    assert search.output_error(found_OI - weight_OI, x_RI) < search.output_error(plain_OI - weight_OI, x_RI)


def test_an_outlier_that_the_sample_never_reads_is_hardly_cut_off() -> None:
    """Cutting it down would make the sampled output better, and the weight far from what it was, for a text that does read it."""
    weight_OI, x_RI = spiked(2.0, slice(5, 6))
    cut_OI = ROUNDING.rounded(weight_OI, torch.full((48, 2), 15 / 27)).meaning()
    whole_OI = ROUNDING.rounded(weight_OI).meaning()
    assert search.output_error((cut_OI - weight_OI)[:8], x_RI) < search.output_error((whole_OI - weight_OI)[:8], x_RI)
    parts_OG = search.best_parts(weight_OI, x_RI, ROUNDING)
    assert parts_OG is not None
    assert (parts_OG[:8, 0] > 0.75).all()
    errors = [(ROUNDING.rounded(weight_OI, parts).meaning() - weight_OI)[:8, :32].square().sum(-1) for parts in (parts_OG, None)]
    assert (errors[0] <= 2 * errors[1]).all()


def test_parts_do_not_depend_on_how_many_rows_are_searched_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces bound the memory, nothing else."""
    weight_OI, x_RI = weight(48, 64), rows()
    whole = search.best_parts(weight_OI, x_RI, ROUNDING)
    monkeypatch.setattr(search, "_CPU_CHUNK", 64 * 7)
    pieces = search.best_parts(weight_OI, x_RI, ROUNDING)
    assert whole is not None
    assert pieces is not None
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("divisor", [None, 7.5, 7.0])
def test_without_cuts_no_weight_is_further_than_half_a_step(divisor: float | None) -> None:
    """So queries and keys are searched: the output comes nearer by other steps, and nothing is cut off by more."""
    weight_OI, x_RI = weight(48, 64), rows()
    rounding = Rounding(group=32, divisor=divisor, scale_dtype=torch.float32)
    parts_OG = search.best_parts(weight_OI, x_RI, rounding, cuts=False)
    assert parts_OG is not None
    plain, found = rounding.rounded(weight_OI), rounding.rounded(weight_OI, parts_OG)
    steps_OI = found.scales_OG.repeat_interleave(32, dim=1)
    assert ((found.meaning() - weight_OI).abs() <= steps_OI * 0.5001).all()
    assert (found.scales_OG != plain.scales_OG).sum() > 10
    errors = [search.output_error(each.meaning() - weight_OI, x_RI) for each in (found, plain)]
    assert errors[0] < errors[1]


def test_groups_of_zeros_stay_zeros() -> None:
    """Beside groups that are searched, and whatever part of their range they are rounded by."""
    weight_OI = weight(48, 64)
    weight_OI[:, :32] = 0
    for divisor in (None, 7.5, 7.0):
        rounding = Rounding(group=32, divisor=divisor, scale_dtype=torch.float16)
        parts_OG = search.best_parts(weight_OI, rows(), rounding)
        assert parts_OG is not None
        for parts in (parts_OG, parts_OG * 5):
            found = rounding.rounded(weight_OI, parts)
            assert (found.meaning()[:, :32] == 0).all()
            assert (found.scales_OG > 0).all()


def test_weights_on_a_grid_of_seven_steps_are_met_by_a_wider_range() -> None:
    """Largest / 7.5 has them not, a range wider by 7.5 / 7 has them all."""
    numbers_OI = torch.randint(-7, 8, (16, 64), generator=torch.Generator().manual_seed(1)).float()
    numbers_OI[:, ::32] = 7
    parts_OG = search.best_parts(numbers_OI, rows(), ROUNDING)
    assert parts_OG is not None
    torch.testing.assert_close(ROUNDING.rounded(numbers_OI, parts_OG).meaning(), numbers_OI, rtol=1e-6, atol=0)


def test_weights_that_are_numbers_of_the_grid_are_left_there() -> None:
    """Nothing is better than no error."""
    numbers_OI = torch.randint(-7, 8, (16, 64), generator=torch.Generator().manual_seed(1)).float()
    numbers_OI[:, ::32] = -7
    whole = Rounding(group=32, divisor=7.0, scale_dtype=torch.float32)
    assert torch.equal(whole.rounded(numbers_OI).meaning(), numbers_OI)
    assert search.best_parts(numbers_OI, rows(), whole) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_and_its_weights_compute_what_they_did(dtype: torch.dtype) -> None:
    """(norm weight / s rounded) times (columns * s) is the product as it was, to float32, however the norm's weight rounds."""
    norm_E = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    norm_E[9] = 0
    bias_E = torch.ones(64)
    vector = PlainVector(declared=Vector("norm", EMB, True, "n"), path="h.n", weight_E=norm_E, bias_E=bias_E)
    folded, scale_I = Folded(), torch.linspace(0.01, 9, 64)
    folded.into_norm(vector, ["h.a", "h.b"], scale_I, dtype)
    for path in ("h.a", "h.b"):
        product_OI = folded.scaled(path, weight(5, 64)) * folded.tensors["h.n.weight"].float()
        torch.testing.assert_close(product_OI, weight(5, 64) * norm_E, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(folded.unscaled(path, folded.scaled(path, weight(5, 64))), weight(5, 64), rtol=1e-6, atol=0)
    assert folded.tensors["h.n.weight"].dtype == folded.tensors["h.n.bias"].dtype == dtype
    product = folded.tensors["h.n.bias"].float() * folded.columns["h.a"]
    torch.testing.assert_close(product, bias_E, rtol=2**-8, atol=0)


def test_the_rows_before_a_linear_take_its_scale_and_so_does_their_bias() -> None:
    """down(x * up(x)): rows of `up` divided, columns of `down` multiplied."""
    declared = Linear("gate_up", (Part("gate", FFN, 8, source="gate"), Part("up", FFN, 8, source="up")), EMB)
    gate_up = PlainLinear(
        declared=declared,
        weights={"h.gate": weight(8, 64), "h.up": weight(8, 64, seed=1)},
        biases={"h.gate": torch.ones(8), "h.up": torch.full((8,), 3.0)},
    )
    folded, scale_I = Folded(), torch.linspace(0.5, 4, 8)
    folded.into_rows(gate_up, Rows(linear="gate_up", part="up"), ["h.down"], scale_I, torch.float32)
    torch.testing.assert_close(folded.scaled("h.up", gate_up.weights["h.up"]), gate_up.weights["h.up"] / scale_I[:, None])
    assert torch.equal(folded.scaled("h.gate", gate_up.weights["h.gate"]), gate_up.weights["h.gate"])
    torch.testing.assert_close(folded.scaled("h.down", weight(3, 8)), weight(3, 8) * scale_I)
    assert folded.tensors.keys() == {"h.up.bias"}
    torch.testing.assert_close(folded.tensors["h.up.bias"], 3 / scale_I)


def attention(values: int, queries: int) -> tuple[Linear, Linear]:
    """Return v and o of so many heads of 4 numbers."""
    v = Linear("v", (Part("v", KV_HEADS, values, 4, source="v"),), EMB)
    return v, Linear("o", (Part("o", EMBED, 64),), Part("heads", HEADS, queries, 4), fed_by="attention", follows="v")


def test_query_heads_that_share_values_share_a_scale() -> None:
    """Attention over v's heads, each read by three query heads, computes what it did; the bias is divided with its rows."""
    v, o = attention(2, 6)
    (rows,) = [group.follows for group in scale_groups(WeightTable(outer=(), layer=(v, o), num_layers=1)) if group.follows]
    assert rows == Rows(linear="v", part="v", unit=4, copies=3)
    scale_I = shared(torch.linspace(0.3, 5, 24), rows)
    torch.testing.assert_close(scale_I.view(2, 3, 4)[1, 2], torch.linspace(0.3, 5, 24).view(2, 3, 4)[1].mean(0))
    plain = PlainLinear(declared=v, weights={"h.v": weight(8, 64)}, biases={"h.v": torch.ones(8)})
    folded = Folded()
    folded.into_rows(plain, rows, ["h.o"], scale_I, torch.float32)

    def attended(v_OI: Tensor, bias_O: Tensor, o_OI: Tensor) -> Tensor:
        heads_TKD = (weight(5, 64, seed=2) @ v_OI.T + bias_O).view(5, 2, 4)
        return heads_TKD.repeat_interleave(3, dim=1).flatten(1) @ o_OI.T

    o_OI = weight(7, 24, seed=3)
    found = attended(folded.scaled("h.v", plain.weights["h.v"]), folded.tensors["h.v.bias"], folded.scaled("h.o", o_OI))
    torch.testing.assert_close(found, attended(plain.weights["h.v"], plain.biases["h.v"], o_OI))


def test_rows_that_feed_one_input_each_leave_their_means_apart() -> None:
    """No head of values is shared."""
    values_I = torch.linspace(0.3, 5, 24)
    assert torch.equal(shared(values_I, Rows(linear="v", part="v", unit=4)), values_I)


def test_groups_are_what_one_input_feeds() -> None:
    """A norm's linears together, whatever branch; a linear behind a part; and one behind what nothing can be folded into."""
    qkv = Linear("qkv", (Part("qkv", EMBED, 8),), EMB, fed_by="norm")
    up = Linear("up", (Part("up", FFN, 8),), EMB, fed_by="norm")
    down = Linear("down", (Part("down", EMBED, 64),), Part("ffn", FFN, 8), fed_by="act", follows="up")
    dense = Linear("dense", (Part("dense", EMBED, 64),), Part("heads", EMBED, 8), fed_by="attention")
    table = WeightTable(outer=(), layer=(Vector("norm", EMB), qkv, dense, up, down), num_layers=1)
    assert scale_groups(table) == (
        ScaleGroup(linears=("qkv", "up"), norm="norm"),
        ScaleGroup(linears=("dense",)),
        ScaleGroup(linears=("down",), follows=Rows(linear="up", part="up")),
    )


def test_rows_that_two_groups_follow_are_left_alone() -> None:
    """What is right for one would be wrong for the other."""
    up = Linear("up", (Part("up", FFN, 16),), EMB, fed_by="norm")
    ends = [
        Linear(name, (Part(name, EMBED, 64),), Part("ffn", FFN, 16), fed_by=f"act_{name}", follows="up")
        for name in ("one", "other")
    ]
    groups = scale_groups(WeightTable(outer=(), layer=(Vector("norm", EMB), up, *ends), num_layers=1))
    assert [group.follows for group in groups] == [None, None, None]


@pytest.mark.parametrize(("follows", "inputs"), [("vp", 16), ("qkv", 12), ("qkv", 4)])
def test_a_linear_that_follows_nothing_is_refused(follows: str, inputs: int) -> None:
    """A part of no linear, or one whose rows are no even share of the inputs."""
    qkv = Linear("qkv", (Part("qkv", EMBED, 8),), EMB, fed_by="norm")
    down = Linear("down", (Part("down", EMBED, 64),), Part("ffn", FFN, inputs), fed_by="act", follows=follows)
    with pytest.raises(
        PluginError, match=f"linear 'down' follows '{follows}', and no part of its layer has that name and {inputs} rows"
    ):
        scale_groups(WeightTable(outer=(), layer=(qkv, down), num_layers=1))


def test_heads_of_another_size_are_refused() -> None:
    """8 heads of 2 numbers are no share of 4 heads of 4."""
    _, o = attention(2, 4)
    v = Linear("v", (Part("v", KV_HEADS, 4, 2),), EMB)
    with pytest.raises(PluginError, match="16 rows in pieces of 4, or an even share"):
        scale_groups(WeightTable(outer=(), layer=(v, o), num_layers=1))


def test_the_sample_is_bounded_evenly_spread_and_the_same_however_tokens_come() -> None:
    """Every 2^k-th row, from the first; means and maxima are of all rows."""
    x_TI = torch.arange(5000.0)[:, None] * torch.tensor([1.0, -2.0])
    once, pieces = SeenInputs(), SeenInputs()
    once.see(x_TI)
    for piece in torch.split_with_sizes(x_TI, [1, 700, 7, 3000, 1292]):
        pieces.see(piece)
    for seen in (once, pieces):
        assert torch.equal(seen.rows(), x_TI[::8])
        assert SAMPLE_ROWS / 2 <= len(seen.rows()) <= SAMPLE_ROWS
        torch.testing.assert_close(seen.mean("x"), x_TI.abs().mean(0))
        assert seen.largest().tolist() == [4999, 9998]


def test_inputs_that_are_not_finite_are_refused() -> None:
    """By name."""
    seen = SeenInputs()
    seen.see(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(CheckpointError, match="the inputs of h hold values that are not finite"):
        seen.mean("the inputs of h")
