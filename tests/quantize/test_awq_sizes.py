"""Which groups `awq` takes for the real models' sizes, alone and over ranks; nothing is read for it but config.json."""

from __future__ import annotations

from typing import Any

import pytest

from paddock import axes
from paddock.axes import FFN, HEADS, KV_HEADS, Linear, Shard, WeightTable
from paddock.errors import OptionError
from paddock.plugins import resolve
from paddock.quantize.recipe import RecipeInputs
from paddock_falcon.plugin import paddock_models as falcon
from paddock_llama.plugin import paddock_models as llama
from paddock_quant_awq.recipes.chosen import Chosen, chosen
from paddock_quant_awq.recipes.groups import scale_groups

(FALCON,), (LLAMA,) = falcon(), llama()
FALCON_7B = {"num_attention_heads": 71, "hidden_size": 4544, "multi_query": True, "bias": False}
FALCON_40B = {"num_attention_heads": 128, "num_kv_heads": 8, "hidden_size": 8192, "new_decoder_architecture": True}
FALCON_180B = {"num_attention_heads": 232, "num_kv_heads": 8, "hidden_size": 14848, "new_decoder_architecture": True}
FALCON_RW = {
    "num_attention_heads": 32,
    "hidden_size": 2048,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LLAMA_FED_BY_NORMS = ", ".join((*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj"))
STORIES = {"hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6}


def table(config: dict[str, Any]) -> WeightTable:
    """Return the weight table of a model of these sizes."""
    spec = LLAMA if "intermediate_size" in config else FALCON
    common = {"num_hidden_layers": 2, "vocab_size": 64, "torch_dtype": "bfloat16"}
    found: WeightTable = resolve(spec.weights)(resolve(spec.parse_config)(config | common))
    return found


def settled(config: dict[str, Any], **asked: Any) -> Chosen:
    """Return what the recipe makes of a model."""
    return chosen(RecipeInputs(table=table(config), dtype="bfloat16", **asked))


def test_without_options_it_is_w4a16_in_compressed_tensors_with_groups_of_128() -> None:
    """Where that divides every linear's inputs."""
    for config in (FALCON_40B, FALCON_180B, FALCON_RW, LLAMA_7B, LLAMA_70B):
        assert settled(config) == Chosen(format="compressed-tensors", scheme="w4a16", group_size=128, zero_points=True)


@pytest.mark.parametrize(
    ("config", "says", "fix"),
    [
        (SMOLLM2, f"{LLAMA_FED_BY_NORMS} have 576 inputs: 4.5 groups", "use --group-size 64 or 32"),
        (STORIES, f"{LLAMA_FED_BY_NORMS} have 288 inputs: 2.25 groups", "use --group-size 32"),
        (
            FALCON_7B,
            "self_attention.query_key_value, self_attention.dense, mlp.dense_h_to_4h have 4544 inputs: 35.5 groups",
            "use --group-size 64 or 32",
        ),
        (
            STORIES | {"intermediate_size": 800},
            f"{LLAMA_FED_BY_NORMS} have 288 inputs: 2.25 groups; mlp.down_proj has 800 inputs: 6.25 groups",
            "use --group-size 32",
        ),
    ],
)
def test_models_with_odd_widths_are_told_what_works(config: dict[str, Any], says: str, fix: str) -> None:
    """The default of 128 is refused like one that was asked for; every linear that it does not divide is named."""
    for asked in ({}, {"group_size": 128}):
        with pytest.raises(OptionError) as raised:
            settled(config, **asked)
        assert raised.value.message == f"group_size is 128, and {says}"
        assert raised.value.fix == fix


@pytest.mark.parametrize(
    ("config", "ranks", "size"),
    [
        (FALCON_180B, 4, 128),
        (FALCON_180B, 8, 64),
        (FALCON_40B, 8, 128),
        (FALCON_7B, 8, 32),
        (LLAMA_70B, 8, 128),
        (LLAMA_7B, 2, 128),
        (LLAMA_7B, 4, 64),
        (LLAMA_7B, 8, 32),
    ],
)
def test_groups_that_no_share_slices_are_chosen(config: dict[str, Any], ranks: int, size: int) -> None:
    """The largest whose groups are whole on every rank of the linears whose inputs are cut."""
    assert settled(config, tp_compatible=ranks).group_size == size
    shares = [
        Shard(rank, ranks, frozenset({HEADS, KV_HEADS, FFN})).span(linear.inp)
        for linear in table(config).layer
        if isinstance(linear, Linear)
        for rank in range(ranks)
    ]
    assert all(start % size == stop % size == 0 for start, stop in shares)
    larger = [start % (2 * size) or stop % (2 * size) for start, stop in shares]
    assert size == 128 or any(larger)


@pytest.mark.parametrize(
    ("config", "asked", "says", "fix"),
    [
        (
            FALCON_180B,
            {"tp_compatible": 8, "group_size": 128},
            "self_attention.dense has 1856 inputs on each of 8 ranks: 14.5 groups",
            "use --group-size 64 or 32",
        ),
        (LLAMA_7B, {"tp_compatible": 16}, "688 inputs of mlp.down_proj on each of 16 ranks", "use --tp-compatible 8"),
        (STORIES, {"tp_compatible": 2}, "the 144 inputs of self_attn.o_proj on each of 2 ranks", "use --tp-compatible 1"),
        (
            STORIES | {"intermediate_size": 800},
            {"tp_compatible": 2},
            "divides the 144 inputs of self_attn.o_proj, nor the 400 inputs of mlp.down_proj on each of 2 ranks",
            "use --tp-compatible 1",
        ),
        (SMOLLM2, {"tp_compatible": 2}, "tp_compatible is 2: part 'q' has 9 heads", "divides 9"),
    ],
)
def test_groups_that_ranks_would_slice_are_refused(config: dict[str, Any], asked: dict[str, int], says: str, fix: str) -> None:
    """With the linear, its share, and what works."""
    with pytest.raises(OptionError) as raised:
        settled(config, **asked)
    assert says in raised.value.message
    assert fix in raised.value.fix


@pytest.mark.parametrize(
    ("layout", "scheme", "default"),
    [
        ("compressed-tensors", "w4a16", True),
        ("compressed-tensors", "w4a8", True),
        ("autoawq", "w4a16", True),
        ("modelopt", "w4a16", False),
    ],
)
def test_zero_points_are_chosen_where_a_layout_leaves_them_open(layout: str, scheme: str, default: bool) -> None:
    """compressed-tensors' does; AutoAWQ's always has them, ModelOpt's never, and the other choice is refused."""
    assert settled(LLAMA_7B, format=layout, scheme=scheme).zero_points is default
    assert settled(LLAMA_7B, format=layout, scheme=scheme, zero_points=default).zero_points is default
    if layout == "compressed-tensors":
        assert settled(LLAMA_7B, format=layout, scheme=scheme, zero_points=not default).zero_points is not default
        return
    with pytest.raises(OptionError, match=f"zero_points is {not default}, and") as raised:
        settled(LLAMA_7B, format=layout, scheme=scheme, zero_points=not default)
    assert raised.value.fix.endswith("or use --format compressed-tensors")


def test_outputs_that_do_not_fill_a_word_are_refused() -> None:
    """AutoAWQ packs eight outputs together, on every rank, and compressed-tensors eight zero points."""
    config = LLAMA_70B | {"num_attention_heads": 128, "num_key_value_heads": 16, "head_dim": 4, "hidden_size": 64}
    config |= {"intermediate_size": 64 * 16}
    with pytest.raises(
        OptionError, match=r"which with zero points stores 8 outputs together; self_attn\.k_proj has 4 on each of 16 ranks"
    ) as raised:
        settled(config, format="autoawq", tp_compatible=16)
    assert raised.value.fix == "use --format compressed-tensors --no-zero-points, or fewer ranks"
    with pytest.raises(OptionError, match="compressed-tensors', which with zero points stores 8 outputs together") as raised:
        settled(config, tp_compatible=16)
    assert raised.value.fix == "use --format compressed-tensors --no-zero-points, or fewer ranks"
    assert settled(config, tp_compatible=16, zero_points=False).group_size == 32


@pytest.mark.parametrize("layout", ["compressed-tensors", "autoawq"])
def test_groups_that_do_not_divide_the_inputs_are_said_before_outputs_that_fill_no_word(layout: str) -> None:
    """A model with both faults is told of its groups: no choice of zero points would help it."""
    config = LLAMA_70B | {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4, "hidden_size": 64}
    config |= {"intermediate_size": 64 * 16}
    with pytest.raises(OptionError, match=r"no group size of 128, 64 or 32 divides the 4 inputs of self_attn\.o_proj on each"):
        settled(config, format=layout, tp_compatible=16)


def folds(config: dict[str, Any]) -> list[tuple[tuple[str, ...], str, str]]:
    """Return what shares a scale, the norm that takes its inverse, and the part that does."""
    return [(group.linears, group.norm, group.follows.part if group.follows else "") for group in scale_groups(table(config))]


def test_llama_folds_into_v_and_up() -> None:
    """With grouped queries too: 8 of 70B share a head of values of 128 numbers."""
    expected = [(("qkv",), "attention_norm", ""), (("o",), "", "v"), (("gate_up",), "mlp_norm", ""), (("down",), "", "up")]
    assert folds(LLAMA_7B) == folds(LLAMA_70B) == expected
    copies = [[group.follows.copies for group in scale_groups(table(each)) if group.follows] for each in (LLAMA_7B, LLAMA_70B)]
    assert copies == [[1, 1], [8, 1]]


def test_falcon_folds_into_its_norms_alone() -> None:
    """One scale for both branches of 7B, one for each of 40B, 180B and RW; a GELU takes none, nor does the fused projection."""
    plain = [(("dense",), "", ""), (("down",), "", "")]
    shared, apart = folds(FALCON_7B), [folds(config) for config in (FALCON_40B, FALCON_180B, FALCON_RW)]
    assert sorted(shared) == sorted([(("qkv", "up"), "norm", ""), *plain])
    for each in apart:
        assert sorted(each) == sorted([(("qkv",), "attention_norm", ""), (("up",), "mlp_norm", ""), *plain])


def test_a_share_keeps_what_a_linear_follows() -> None:
    """A rank's share of a declared linear differs in sizes alone."""
    for linear in table(LLAMA_7B).layer:
        if isinstance(linear, Linear):
            assert Shard(1, 2, frozenset({axes.FFN})).linear(linear).follows == linear.follows
