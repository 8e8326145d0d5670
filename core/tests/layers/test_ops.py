"""The plain-torch ops are what they say, in every dtype and odd shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paddock.layers import reference
from paddock.layers.attention import LayerKV
from paddock.layers.ops import OP_NAMES, Ops
from paddock.layers.rope import cos_sin_table
from paddock.model_config import RopeSpec
from paddock.testing.kernels import check_cache_op, check_op
from paddock.testing.oracle import assert_close, relative_rms


@pytest.mark.parametrize(
    "name", ["embed", "linear", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "silu_mul", "gelu"]
)
def test_an_op_keeps_its_contract_in_every_dtype(name: str) -> None:
    """In 16 bits an op stays within the roundings the table allows of itself in float32."""
    check_op(name, getattr(reference, name), dtypes=[torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("name", ["rope_and_cache", "cache_kv"])
def test_an_op_that_writes_pages_keeps_its_contract(name: str) -> None:
    """Slots hold what the definition says, and nothing else is touched."""
    check_cache_op(name, getattr(reference, name))


def test_writing_a_row_too_many_breaks_the_contract() -> None:
    """The check sees a write beside the slots, and a rotation by the neighbour's position."""

    def careless(k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv: LayerKV, slots_T: torch.Tensor, *scales: None) -> None:
        reference.cache_kv(k_TKD, v_TKD, kv, slots_T, *scales)
        kv.v_pages_NPKD[-1, -1] = 0

    def shifted(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *rest: Any
    ) -> Any:
        return reference.rope_and_cache(q, k, v, table, (positions + 1) % 300, *rest)

    with pytest.raises(AssertionError, match="other rows of v_pages_NPKD"):
        check_cache_op("cache_kv", careless)
    with pytest.raises(AssertionError, match="rope_and_cache q T1"):
        check_cache_op("rope_and_cache", shifted)


def test_rms_norm_rounds_before_the_weight() -> None:
    """The normalised value is rounded to the input's dtype, and only then multiplied by the weight."""
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(32).bfloat16()
    wide = x.double()
    normalised = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(torch.bfloat16)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), normalised * weight)


def test_rotation_pairs_each_dimension_with_the_one_half_a_head_away() -> None:
    """(x_j, x_{j + D/2}) turns by position times frequency, and k lands in its slot."""
    table = cos_sin_table(RopeSpec(theta=100.0), head_dim=4, max_model_len=8, device=torch.device("cpu"))
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    kv = LayerKV(torch.full((2, 4, 1, 4), torch.nan), torch.full((2, 4, 1, 4), torch.nan))
    positions, slots = torch.tensor([5, 2]), torch.tensor([6, 1])
    rotated = reference.rope_and_cache(q, k, v, table, positions, kv, slots, None, None)
    as_complex = torch.complex(q[..., :2].double(), q[..., 2:].double())
    angle = positions[:, None].double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
    turned = as_complex * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert_close(rotated, torch.cat((turned.real, turned.imag), -1), op="rope_and_cache")
    assert torch.equal(kv.v_pages_NPKD.flatten(0, 1)[slots], v)
    assert kv.k_pages_NPKD.flatten(0, 1)[slots].isfinite().all()
    assert int(kv.k_pages_NPKD.isnan().sum()) == 6 * 4


def test_fp8_pages_hold_the_values_divided_by_their_scales() -> None:
    """K and V are stored as x / scale, saturated at 448 instead of turned into NaN."""
    pages = torch.zeros(1, 4, 1, 2).to(torch.float8_e4m3fn)
    kv = LayerKV(pages, pages.clone())
    k = torch.tensor([[[1.0, 1e6]]])
    reference.cache_kv(k, -k, kv, torch.tensor([2]), torch.tensor(0.5), torch.tensor(2.0))
    assert kv.k_pages_NPKD[0, 2, 0].float().tolist() == [2.0, 448.0]
    assert kv.v_pages_NPKD[0, 2, 0].float().tolist() == [-0.5, -448.0]


def test_fp8_activations_map_the_largest_magnitude_to_448() -> None:
    """A token's scale is its largest magnitude over 448, at most the bound, and values above the bound are clipped."""
    x = torch.tensor([[1.0, -896.0], [0.0, 0.0], [2400.0, 1.0]])
    free, bounded = reference.quantize_fp8_token(x), reference.quantize_fp8_token(x, 1200.0)
    assert free.scale.flatten().tolist() == pytest.approx([2.0, 1 / (448 * 512), 2400 / 448])
    assert bounded.scale[2].item() == pytest.approx(1200 / 448)
    assert bounded.values_TI[2, 0].float() == 448.0
    assert relative_rms(free.values_TI.float() * free.scale, x) < 0.04


def test_static_fp8_activations_saturate() -> None:
    """A static scale is used as given; what does not fit is clipped."""
    quantised = reference.quantize_fp8_static(torch.tensor([[2.0, 1e9, -1e9]]), torch.tensor(0.5))
    assert quantised.values_TI.float().tolist() == [[4.0, 448.0, -448.0]]


def test_ops_bind_what_is_named_and_fall_back_to_the_reference() -> None:
    """Binding one op leaves the others to their twins."""

    def gelu(x_TF: torch.Tensor) -> torch.Tensor:
        return x_TF

    ops = Ops.bind({"gelu": gelu})
    assert ops.gelu is gelu
    assert all(getattr(ops, name) is getattr(reference, name) for name in OP_NAMES - {"gelu", "gelu_fp8"})
    for name in GATED:
        assert getattr(Ops.bind({}), name) is getattr(reference, name)


FUSED = ("rms_norm_fp8", "layer_norm_fp8", "silu_mul_fp8", "gelu_fp8")
GATED = {"linear_silu_mul_fp8": "linear_fp8", "linear_silu_mul_fp8_fast": "linear_fp8_fast"}  # each with its product


@pytest.mark.parametrize(("scale", "group"), [(None, None), (0.02, None), (None, 16)], ids=["token", "static", "group"])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_equals_its_parts(name: str, scale: float | None, group: int | None) -> None:
    """The plain result is rounded to the input's dtype, then quantised: the same bits by one op, by two, by a plugin's two."""
    x, delta, weight, bias = (torch.randn(5, 66).bfloat16() for _ in range(4))
    static = None if scale is None else torch.tensor(scale)
    plain = name.removesuffix("_fp8")
    rest = {"rms_norm": (weight[0], 1e-5), "layer_norm": (weight[0], bias[0], 1e-5)}.get(plain)
    sums = [x + delta, x] if rest else [x]
    calls = [(x, delta), (x, None)] if rest else [(x,)]
    for given, total in zip(calls, sums, strict=True):
        expected = getattr(reference, plain)(total, *(rest or ()))
        quantised = (
            reference.quantize_fp8_token(expected, 2.0, group)
            if static is None
            else reference.quantize_fp8_static(expected, static)
        )
        for ops in (Ops(), brought(plain)):
            found = getattr(ops, name)(*given, *(rest or ()), static, 2.0, group)
            if rest:
                found_sum, found = found
                assert torch.equal(found_sum, total)
            assert torch.equal(found.values_TI.view(torch.uint8), quantised.values_TI.view(torch.uint8))
            assert torch.equal(found.scale, quantised.scale)


def brought(plain: str) -> Ops:
    """Return ops of which a plugin implements the plain one."""
    return Ops.bind({plain: lambda *given: getattr(reference, plain)(*given)})


def test_a_fused_op_that_a_plugin_brings_is_not_taken_apart() -> None:
    """Nor is one taken apart whose parts are the core's own."""

    def silu_mul_fp8(*_: Any) -> Any:
        return None

    ops = Ops.bind({"silu_mul": lambda x_T2F: x_T2F, "silu_mul_fp8": silu_mul_fp8})
    assert ops.silu_mul_fp8 is silu_mul_fp8
    assert ops.rms_norm_fp8 is reference.rms_norm_fp8
    quantised: list[torch.Tensor] = []
    Ops.bind({"quantize_fp8_token": lambda x, bound, group: quantised.append(x)}).gelu_fp8(torch.ones(1, 2), None, None)
    assert len(quantised) == 1


def gate_and_up(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return FP8 values, their scale, the weight of seven gates and seven ups, and its rows' scales."""
    x, weight = (torch.randn(shape).mul(50).to(reference.FP8) for shape in ((tokens, 24), (14, 24)))
    return x, torch.rand(()) * 0.01, weight, torch.rand(14, 1) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_that_ends_in_an_activation_is_the_two(dtype: torch.dtype) -> None:
    """Product, silu and its product with up are each rounded, then quantised by the static scale."""
    for tokens in (0, 1, 5):
        given, scale = gate_and_up(tokens), torch.tensor(0.03)
        gate, up = torch.split(reference.linear_fp8(*given, dtype), 7, dim=1)
        silu = (gate.float() * gate.float().sigmoid()).to(dtype)
        expected = ((silu * up).float() / scale).clamp(-448, 448).to(reference.FP8)
        for name in GATED:
            found = getattr(reference, name)(*given, dtype, scale)
            assert found.scale is scale
            assert (found.values_TI.view(torch.uint8) != expected.view(torch.uint8)).sum() <= 1  # silu in another order


@pytest.mark.parametrize("part", ["product", "silu_mul_fp8", "silu_mul", "quantize_fp8_static"])
@pytest.mark.parametrize("name", GATED)
def test_a_product_and_an_activation_that_nobody_fuses_are_those_that_are_bound(name: str, part: str) -> None:
    """Whichever part a plugin brings is called, a part of the activation too, and the bits are those of the definition."""
    called: list[str] = []
    part = GATED[name] if part == "product" else part

    def brought_part(*given: Any) -> Any:
        called.append(part)
        return getattr(reference, part)(*given)

    given, scale = gate_and_up(5), torch.tensor(0.03)
    found = getattr(Ops.bind({part: brought_part}), name)(*given, torch.bfloat16, scale)
    expected = getattr(reference, name)(*given, torch.bfloat16, scale)
    assert called == [part]
    assert torch.equal(found.values_TI.view(torch.uint8), expected.values_TI.view(torch.uint8))


def test_fast_sums_reach_a_product_that_ends_in_an_activation() -> None:
    """A plugin's fused op, whose sums are exact, gives way to its fused op of fast sums, or to the parts of that, as bound."""
    called: list[str] = []

    def noting(name: str) -> Any:
        def op(*given: Any) -> Any:
            called.append(name)
            return getattr(reference, name)(*given)

        return op

    unfused = {name: noting(name) for name in ("linear_fp8", "linear_fp8_fast", "silu_mul_fp8", "linear_silu_mul_fp8")}
    given, scale = gate_and_up(5), torch.tensor(0.03)
    for more, expected in ((["linear_silu_mul_fp8_fast"],) * 2, ([], ["linear_fp8_fast", "silu_mul_fp8"])):
        called.clear()
        ops = Ops.bind(unfused | {name: noting(name) for name in more})
        ops.linear_silu_mul_fp8(*given, torch.bfloat16, scale)
        ops.with_fast_sums().linear_silu_mul_fp8(*given, torch.bfloat16, scale)
        ops.with_fast_sums().linear_fp8(*given, torch.bfloat16)
        assert called == ["linear_silu_mul_fp8", *expected, "linear_fp8_fast"]


def test_fp8_activations_have_a_scale_a_token_and_group() -> None:
    """Each run of 16 features has its largest magnitude, or the bound, at 448; so has the last, of 8."""
    x_TI = torch.randn(5, 40).mul(torch.logspace(-2, 2, 40)).bfloat16()
    for bound in (None, 3.0):
        found = reference.quantize_fp8_token(x_TI, bound, 16)
        assert (found.values_TI.shape, found.scale.shape) == ((5, 40), (5, 3))
        for index, start in enumerate((0, 16, 32)):
            part = reference.quantize_fp8_token(x_TI[:, start : start + 16], bound)
            assert torch.equal(found.values_TI[:, start : start + 16].float(), part.values_TI.float())
            assert torch.equal(found.scale[:, index], part.scale[:, 0])


def test_an_fp8_product_of_blocks_is_the_sum_of_scaled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale for 8 outputs and 16 inputs, and for a token's 16 inputs, the last of each over fewer; in bounded pieces."""
    x, weight = (torch.randn(shape).mul(50).to(reference.FP8) for shape in ((5, 40), (21, 40)))
    x_scale, weight_scale = torch.rand(5, 3), torch.rand(3, 3)
    exact = torch.zeros(5, 21, dtype=torch.float64)
    for token in range(5):
        for out in range(21):
            for i in range(40):
                scale = x_scale[token, i // 16].double() * weight_scale[out // 8, i // 16].double()
                exact[token, out] += scale * x[token, i].double() * weight[out, i].double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        monkeypatch.setattr(reference, "_CHUNK_BYTES", 64 << 20)
        given = (x, x_scale, weight, weight_scale, (8, 16), dtype)
        assert_close(reference.linear_fp8_blocks(*given), exact, op="linear", dtype=dtype)
        monkeypatch.setattr(reference, "_CHUNK_BYTES", 1)
        assert_close(reference.linear_fp8_blocks(*given), exact, op="linear", dtype=dtype)


@pytest.mark.parametrize("static", [True, False])
def test_an_fp8_product_sums_in_float32_and_rounds_once(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of x, [] or one a token, and of the weight's rows; the weight is widened a bounded piece at a time."""
    x, weight = (torch.randn(shape).mul(50).to(reference.FP8) for shape in ((5, 24), (16, 24)))
    x_scale, weight_scale = torch.rand(()) if static else torch.rand(5, 1), torch.rand(16, 1)
    exact = (x.double() * x_scale) @ (weight.double() * weight_scale).T
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        monkeypatch.setattr(reference, "_CHUNK_BYTES", 64 << 20)
        whole = reference.linear_fp8(x, x_scale, weight, weight_scale, dtype)
        assert_close(whole, exact, op="linear", dtype=dtype)
        monkeypatch.setattr(reference, "_CHUNK_BYTES", 4 * 24 * 5)
        torch.testing.assert_close(reference.linear_fp8(x, x_scale, weight, weight_scale, dtype), whole)
