"""The same engine on a GPU, where the step overlaps with the host's work.

T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paddock import LLM, SamplingParams
from paddock.plugins.builtin import OPS, SAMPLING_OPS
from paddock.testing.oracle import relative_rms
from paddock.testing.paging import step
from tests.assets.built import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MIXED = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, max_tokens=33, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=8, top_k=20, top_p=0.9, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=9, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.5, max_tokens=20),
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=2, prompt_logprobs=1, logit_bias={5: 3.0}, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=17, min_tokens=4),
]
LLAMA_OPS = ("embed", "linear", "rms_norm", "add_rms_norm", "silu_mul", "rope_and_cache")
PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(1 + 19 * i)] for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def _answers(folder: Path, device: str, **options: Any) -> list[list[list[int]]]:
    """Return the tokens of every continuation of every prompt, all in one batch."""
    with LLM(folder, device=device, dtype="float32", tokenizer="none", kv_cache_memory_bytes=1 << 21, **options) as llm:
        outputs = llm.generate(PROMPTS, [MIXED[i % len(MIXED)] for i in range(len(PROMPTS))])
    return [[part.token_ids for part in output.outputs] for output in outputs]


def _plain_but(fused: tuple[str, ...]) -> dict[str, str]:
    """Return the option that takes every op from the core, except for these."""
    return {op: "builtin" for op in (*OPS, *SAMPLING_OPS) if op not in fused}


def _logits(folder: Path, device: str, ops: dict[str, str]) -> list[torch.Tensor]:
    """Return the logits [T, V] of every prompt: all but the last token as one prefill, that one as a decode."""
    built = build(folder, device=device, dtype="float32", tokenizer="none", kv_cache_memory_bytes=1 << 21, ops=ops)
    pages = built.pages(len(PROMPTS), length=256)
    named = {str(i): prompt for i, prompt in enumerate(PROMPTS)}
    starts = step(built.model, pages, built.backend, [(name, prompt[:-1]) for name, prompt in named.items() if len(prompt) > 1])
    ends = step(built.model, pages, built.backend, [(name, prompt[-1:]) for name, prompt in named.items()])
    return [logits_TV.cpu() for logits_TV in (*starts, *ends)]


@pytest.mark.parametrize("fused", [(), *((op,) for op in LLAMA_OPS), LLAMA_OPS], ids=lambda ops: "+".join(ops) or "none fused")
def test_a_gpu_gives_the_logits_of_a_cpu(folder: Path, fused: tuple[str, ...]) -> None:
    """In float32, with plain ops, with each fused op by itself and with all of them: nothing but the order of sums differs.

    Tokens stay the same up to an error of 1e-5 in every linear's output and change from 1e-4 on, which is where products of
    TF32 would be.
    """
    for found_TV, expected_TV in zip(_logits(folder, "cuda", _plain_but(fused)), _logits(folder, "cpu", {}), strict=True):
        assert relative_rms(found_TV, expected_TV) < 1e-5


@pytest.mark.parametrize("fused", [(), LLAMA_OPS, tuple(SAMPLING_OPS)], ids=["nothing", "the layers", "the sampler"])
def test_a_gpu_gives_the_tokens_of_a_cpu_whatever_is_fused(folder: Path, fused: tuple[str, ...]) -> None:
    """A difference that shows with some ops alone is those ops'; one with plain ops is torch's or the executor's."""
    assert _answers(folder, "cuda", ops=_plain_but(fused)) == _answers(folder, "cpu")


def test_a_gpu_gives_the_tokens_of_a_cpu(folder: Path) -> None:
    """Greedy and seeded tokens in float32 are the same, though the GPU's steps are scheduled one ahead."""
    assert _answers(folder, "cuda") == _answers(folder, "cpu")


def test_preemption_and_chunks_change_no_token_on_a_gpu(folder: Path) -> None:
    """A small token budget and few sequences at once give the same tokens as everything at once."""
    narrow = _answers(folder, "cuda", max_num_seqs=3, max_num_batched_tokens=16)
    assert narrow == _answers(folder, "cuda")
