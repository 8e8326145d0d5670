from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from paddock.checkpoint.load import load
from paddock.errors import CheckpointError, PlanError
from paddock.layers import HEADS_APART, TWO_DELTAS, Ops, reference, takes, targets
from paddock.testing.contracts import build_model, check_model, check_tensor_parallel
from paddock.testing.oracle import relative_rms
from paddock_falcon.plugin import paddock_models

(SPEC,) = paddock_models()
KINDS: dict[str, dict[str, Any]] = {
    "shared-norm": {},
    "two-norms": {"new_decoder_architecture": True},
    "grouped-shared-norm": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    "serial": {"multi_query": False, "parallel_attn": False},
    "parallel-heads": {"multi_query": False},
}
BOUND = 1e-5  # relative RMS in float32
TOKENS = torch.randint(0, 62, (41,), generator=torch.Generator().manual_seed(2)).tolist()


def read_back(reference: Any) -> dict[str, Any]:
    """Return the config.json transformers writes for a model."""
    raw: dict[str, Any] = json.loads(reference.config.to_json_string())
    return raw


def test_logits_agree_with_transformers(variant: dict[str, Any], reference_model: Callable[[dict[str, Any]], Any]) -> None:
    """From the same weights every variant gives the logits of transformers, all at once and token by token."""
    reference = reference_model(variant)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    built = build_model(SPEC, read_back(reference), state=reference.state_dict())
    assert relative_rms(built.run([("a", TOKENS)])["a"], expected) < BOUND
    token_by_token = [[("a", TOKENS[:17])], *([("a", [token])] for token in TOKENS[17:])]
    assert relative_rms(built.run(*token_by_token)["a"], expected) < BOUND


def test_the_fused_projection_is_not_copied(variant: dict[str, Any]) -> None:
    """What rotates and keeps heads is given views of the projection's own memory, a token's heads as the projection has them."""
    built, seen, made = build_model(SPEC, variant), list[Tensor](), list[Tensor]()

    @takes(HEADS_APART)
    def rope_and_cache(*given: Any) -> Tensor:
        seen.extend(given[:3])
        return reference.rope_and_cache(*given)

    @takes(HEADS_APART)
    def cache_kv(*given: Any) -> None:
        seen.extend(given[:2])
        reference.cache_kv(*given)

    for block in built.model.blocks:
        block.attention.attend.ops = Ops.bind({"rope_and_cache": rope_and_cache, "cache_kv": cache_kv})
        block.attention.qkv.register_forward_hook(lambda _, given, qkv_TX: made.append(qkv_TX))
    built.run([("a", TOKENS)])
    each = 2 if variant.get("alibi") else 3
    assert len(seen) == each * len(made) == each * variant["num_hidden_layers"]
    for i, x in enumerate(seen):
        qkv_TX = made[i // each]
        assert x.untyped_storage().data_ptr() == qkv_TX.untyped_storage().data_ptr()
        assert (x.stride(0), x.stride(-1)) == (qkv_TX.stride(0), 1)


def test_ops_that_know_neither_groups_nor_two_deltas_give_the_same_logits(variant: dict[str, Any]) -> None:
    """As plugins wrote them before: heads reach them side by side, and one delta, to the bit."""

    def rope_and_cache(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *rest: Any) -> Tensor:
        return reference.rope_and_cache(_dense(q_THD), _dense(k_TKD), _dense(v_TKD), *rest)

    def cache_kv(k_TKD: Tensor, v_TKD: Tensor, *rest: Any) -> None:
        reference.cache_kv(_dense(k_TKD), _dense(v_TKD), *rest)

    def add_layer_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return reference.add_layer_norm(x_TE, delta_TE, weight_E, bias_E, eps)

    def _dense(x_THD: Tensor) -> Tensor:
        assert x_THD.stride()[1:] == (x_THD.shape[2], 1)
        return x_THD

    built = build_model(SPEC, variant)
    expected = built.run([("a", TOKENS)])["a"]
    old = Ops.bind({"rope_and_cache": rope_and_cache, "cache_kv": cache_kv, "add_layer_norm": add_layer_norm})
    for module in built.model.modules():
        if isinstance(getattr(module, "ops", None), Ops):
            module.ops = old
    assert torch.equal(built.run([("a", TOKENS)])["a"], expected)


def test_a_parallel_block_leaves_its_sum_to_the_next_norm(variant: dict[str, Any]) -> None:
    """Both branches reach the next block's norm apart; a serial block has one delta left."""
    built, seen = build_model(SPEC, variant), list[bool]()

    @takes(TWO_DELTAS)
    def add_layer_norm(*given: Any, more_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append(more_TE is not None)
        return reference.add_layer_norm(*given, more_TE=more_TE)

    first_norm = "norm" if hasattr(built.model.blocks[1], "norm") else "attention_norm"
    getattr(built.model.blocks[1], first_norm).ops = Ops.bind({"add_layer_norm": add_layer_norm})
    built.run([("a", TOKENS)])
    assert seen == [variant.get("parallel_attn", True)]


def test_every_variant_keeps_the_model_contracts(variant: dict[str, Any]) -> None:
    """Chunking, batching, permuting, sharding and loading change no logits; ranks that cannot cut one KV group all hold it."""
    check_model(SPEC, variant)


def test_alibi_agrees_for_heads_whose_slopes_bfloat16_cannot_hold(
    reference_model: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 12 and 16 heads, once transformers keeps its slopes in float32; rounded to bfloat16 they are what differs."""
    for heads in (12, 16):
        raw = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_hidden_layers": 2, "vocab_size": 62, "alibi": True}
        reference = reference_model(raw | {"bias": True, "multi_query": False, "parallel_attn": False})
        actual = build_model(SPEC, read_back(reference), state=reference.state_dict()).run([("a", TOKENS)])["a"]
        with torch.no_grad():
            rounded = reference(torch.tensor([TOKENS])).logits[0]
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, "bfloat16", Tensor.float)
                exact = reference(torch.tensor([TOKENS])).logits[0]
        assert relative_rms(actual, exact) < BOUND
        assert BOUND < relative_rms(actual, rounded) < 1e-2


@given(
    kind=st.sampled_from(["shared-norm", "two-norms", "grouped-shared-norm", "serial", "parallel-heads"]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 3), (8, 1), (8, 4)]),
    head_dim=st.sampled_from([2, 6, 16]),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 40),
    vocab=st.integers(2, 70),
    length=st.integers(2, 40),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_agree_with_transformers_on_random_shapes(
    reference_model: Callable[[dict[str, Any]], Any],
    kind: str,
    heads: tuple[int, int],
    head_dim: int,
    layers: int,
    ffn: int,
    vocab: int,
    length: int,
    flags: tuple[bool, bool, bool],
    eps: float,
    seed: int,
) -> None:
    """Any combination of block, sizes, biases, ties, rotation or ALiBi agrees, as a prompt and a decode after it."""
    num_heads, (bias, tied, alibi) = heads[0], flags
    raw: dict[str, Any] = {"num_attention_heads": num_heads, "hidden_size": num_heads * head_dim, "num_hidden_layers": layers}
    raw |= {"ffn_hidden_size": ffn, "vocab_size": vocab, "max_position_embeddings": 64, "layer_norm_epsilon": eps}
    raw |= {"bias": bias, "tie_word_embeddings": tied, "alibi": alibi, "bos_token_id": 0, "eos_token_id": 1}
    reference = reference_model(
        raw | KINDS[kind] | ({"num_kv_heads": heads[1]} if "new_decoder_architecture" in KINDS[kind] else {})
    )
    tokens = torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
    built = build_model(SPEC, read_back(reference), state=reference.state_dict())
    actual = built.run([("a", tokens[:-1].tolist())], [("a", tokens[-1:].tolist())])["a"]
    assert relative_rms(actual, expected) < BOUND


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_give_the_logits_of_one(variant: dict[str, Any], world: int) -> None:
    """Two, four and eight ranks that hold whole KV groups, or all of the only one, sum to the model, biases counted once."""
    grouped = {"num_kv_heads": 8} if "num_kv_heads" in variant else {}
    sizes = {"hidden_size": 128, "num_attention_heads": 16, "vocab_size": 64, "bias": True}
    check_tensor_parallel(SPEC, variant | sizes | grouped, world=world)


def test_ranks_that_cannot_sum_over_groups_are_refused() -> None:
    """Four ranks hold one of two KV groups each, twice over: their sums would count it twice, so they are an error."""
    grouped = {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    with pytest.raises(PlanError, match="2 kv_heads: 4 ranks"):
        check_tensor_parallel(SPEC, grouped | {"num_hidden_layers": 1, "vocab_size": 64}, world=4)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_may_be_stored_and_an_untied_one_must_be(
    reference_model: Callable[[dict[str, Any]], Any], tmp_path: Path, *, tied: bool, stored: bool
) -> None:
    """Files with and without `lm_head.weight` load into a tied model; without it an untied one is an error naming it."""
    reference = reference_model({"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 62})
    state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    expected = build_model(SPEC, read_back(reference), state=state).run([("a", TOKENS)])["a"]
    if not stored:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    built = build_model(SPEC, read_back(reference) | {"tie_word_embeddings": tied})
    if not tied and not stored:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            load(tmp_path, targets(built.model), ignored_suffixes=built.table.ignored)
        return
    load(tmp_path, targets(built.model), ignored_suffixes=built.table.ignored)
    assert torch.equal(built.run([("a", TOKENS)])["a"], expected)


@pytest.mark.parametrize("stored", ["transformer.word_embeddings.weight", "lm_head.weight"])
def test_stages_find_a_tied_table_under_either_name(
    reference_model: Callable[[dict[str, Any]], Any], tmp_path: Path, stored: str
) -> None:
    """A file that holds the table once, under the embedding's name or the head's, fills the first stage and the last."""
    reference = reference_model({"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 62})
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    table_VE = state.pop("lm_head.weight")
    del state["transformer.word_embeddings.weight"]
    save_file(state | {stored: table_VE}, tmp_path / "model.safetensors")
    for layers in (range(2), range(1), range(1, 2)):
        built = build_model(SPEC, read_back(reference), layers=layers, finalised=False)
        others = tuple(f"h.{i}." for i in range(2) if i not in layers)
        unread = [*built.table.ignored, "ln_f.weight", "ln_f.bias", "word_embeddings.weight"]
        unread += [name for name in state if any(other in name for other in others)]
        load(tmp_path, targets(built.model), ignored_suffixes=unread)
        if layers.start == 0:
            assert torch.equal(built.model.embedding.weight, table_VE)
        if layers.stop == 2:
            assert torch.equal(built.model.lm_head.weight, table_VE)
