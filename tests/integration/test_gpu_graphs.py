"""Captured decodes against the same engine without graphs: the same tokens, whatever is in the batch and however it changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from paddock import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9},
    "filtered": {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "edited": {"temperature": 0.7, "logit_bias": {5: 3.0, 9: -4.0}, "min_tokens": 4},
    "logprobs": {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
}
SIZES = range(1, 18)  # on, below and above every padded size up to 17
LAYERS, KV_HEADS, PAGE = 2, 2, 64
HEADS = (64, 128)
QUANTIZED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "awq, groups of 64": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128},
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "fp8 blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8 weights": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
}


@pytest.fixture(scope="module", params=HEADS, ids="heads of {}".format)
def head(request: pytest.FixtureRequest) -> int:
    """Return the head size."""
    return int(request.param)


@pytest.fixture(scope="module")
def folder(head: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random Llama with 4 heads on 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=4 * head,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    path, model = tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def page_bytes(head: int) -> int:
    """Return the bytes of a page: keys and values of every layer, two bytes each."""
    return PAGE * LAYERS * KV_HEADS * head * 2 * 2


def _requests(count: int, *kinds: str, longer: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
    """Return prompts of 1 to 134 tokens and how each is sampled, the kinds taking turns; each makes 9 to 39 and `longer` more."""
    names = kinds or tuple(KINDS)
    prompts = [[(7 * i + 3 * j) % 500 + 2 for j in range(1 + 19 * i % 134)] for i in range(count)]
    params = [
        SamplingParams(max_tokens=9 + 5 * (i % 7) + longer, ignore_eos=True, seed=100 + i, **KINDS[names[i % len(names)]])
        for i in range(count)
    ]
    return prompts, params


@contextmanager
def _engines(folder: Path, **options: Any) -> Iterator[tuple[LLM, LLM]]:
    """Yield the captured and the eager engine."""
    given = {"device": "cuda", "dtype": "bfloat16", "tokenizer": "none", "max_model_len": 256, "kv_cache_memory_bytes": 1 << 26}
    options = {**given, **options}
    with LLM(str(folder), **options) as captured, LLM(str(folder), enforce_eager=True, **options) as eager:
        yield captured, eager


def _said(llm: LLM, requests: tuple[list[list[int]], list[SamplingParams]]) -> list[Any]:
    """Return each request's tokens, why it ended and, where asked for, its logprobs."""
    outputs = llm.generate(*requests)
    return [
        (part.token_ids, part.finish_reason, [sorted(entry) for entry in part.logprobs or []])
        for output in outputs
        for part in output.outputs
    ]


def test_a_batch_of_any_size_says_the_same(folder: Path) -> None:
    """1 to 17 requests of every kind, run twice: what a first run captures, the second replays."""
    with _engines(folder) as (captured, eager):
        for count in (*SIZES, *SIZES):
            requests = _requests(count)
            assert _said(captured, requests) == _said(eager, requests), f"batch of {count}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sampling_says_the_same_by_itself(folder: Path, kind: str) -> None:
    """A batch that needs only one kind of sampling takes the quickest way to it, captured or not."""
    with _engines(folder) as (captured, eager):
        for count in (3, 8, 8, 3):
            requests = _requests(count, kind)
            assert _said(captured, requests) == _said(eager, requests), f"batch of {count}"


def test_chunked_prompts_beside_decodes_say_the_same(folder: Path) -> None:
    """With a budget of 24 tokens a step, steps of decodes alone and mixed ones follow each other."""
    with _engines(folder, max_num_batched_tokens=24, max_num_seqs=9) as (captured, eager):
        for _ in range(2):
            assert _said(captured, _requests(17)) == _said(eager, _requests(17))


def test_steps_with_prompts_in_them_are_replayed_too(folder: Path) -> None:
    """A shape that is met again is captured; replayed with other prompts, slots and pages it says what an eager step says."""
    with _engines(folder, enable_prefix_caching=False, max_num_batched_tokens=64) as (captured, eager):
        for longer in range(4):
            requests = _requests(7, "greedy", "filtered", longer=longer)
            assert _said(captured, requests) == _said(eager, requests)
        graphs: Any = captured._engine._engine._runner._padded._graphs  # type: ignore[attr-defined]
        assert any(shape.chunks for shape, _ in graphs)


def test_preempted_requests_say_the_same(folder: Path, page_bytes: int) -> None:
    """Nine pages for 17 sequences that want up to four each: slots and pages change hands under the graphs."""
    options = {"kv_cache_memory_bytes": 9 * page_bytes, "block_size": PAGE, "enable_prefix_caching": False}
    with _engines(folder, **options) as (captured, eager):
        for _ in range(2):
            assert _said(captured, _requests(17, longer=70)) == _said(eager, _requests(17, longer=70))


def _random(folder: Path, quantization: dict[str, Any]) -> Path:
    """Write the config of a tiny Llama in a quantised format, whose weights are to be random; return its folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
        "eos_token_id": 1,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("quantization", QUANTIZED.values(), ids=list(QUANTIZED))
def test_quantised_models_are_captured_too(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """A format's products run inside a graph as outside, and nothing in them needs the host."""
    with _engines(_random(tmp_path, quantization), load_format="dummy", enable_prefix_caching=False) as (captured, eager):
        for count in (3, 8, 8, 3):
            assert _said(captured, _requests(count)) == _said(eager, _requests(count)), f"batch of {count}"


@pytest.mark.parametrize("compute", ["w4a16", "w4a8", "auto"])
@pytest.mark.parametrize("name", ["awq", "awq, groups of 64", "modelopt"])
def test_products_with_4_bit_weights_say_the_same(tmp_path: Path, name: str, compute: str) -> None:
    """On both sides of the border of `auto`, and between 8 and 16, where padding carries a step over it."""
    options = {"load_format": "dummy", "enable_prefix_caching": False, "int4_compute": compute}
    with _engines(_random(tmp_path, QUANTIZED[name]), **options) as (captured, eager):
        for count in (1, 7, 12, 17, 12, 1):
            assert _said(captured, _requests(count)) == _said(eager, _requests(count)), f"batch of {count}"


@pytest.mark.parametrize(
    ("sums", "op"), [("exact", "linear_silu_mul_fp8"), ("fast", "linear_silu_mul_fp8_fast")], ids=["exact", "fast"]
)
def test_gate_and_up_say_the_same_whether_one_kernel_activates_them_or_two(tmp_path: Path, sums: str, op: str) -> None:
    """In static FP8, captured and eager, in decodes of 1 to 17 tokens and steps with prompts."""
    options: dict[str, Any] = {"load_format": "dummy", "enable_prefix_caching": False, "fp8_accumulation": sums}
    model = _random(tmp_path, QUANTIZED["fp8"])
    with _engines(model, **options) as one, _engines(model, ops={op: "paddock"}, **options) as two:
        chosen = [next(s.implementation for s in llm.plan.ops if s.op == op) for llm in (*one, *two)]
        assert [each.partition(".")[0] for each in chosen] == ["paddock_triton"] * 2 + ["paddock"] * 2
        for count in (1, 2, 17):
            first, *others = [_said(llm, _requests(count)) for llm in (*one, *two)]
            assert others == [first] * 3, f"batch of {count}"


def test_a_request_does_not_depend_on_what_ran_before(folder: Path) -> None:
    """After other batches have left their values in a graph's inputs, a request says what it said first."""
    with _engines(folder) as (captured, _):
        alone = _said(captured, _requests(1))
        _said(captured, _requests(17))
        assert _said(captured, _requests(1)) == alone
