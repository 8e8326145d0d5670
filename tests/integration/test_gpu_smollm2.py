"""A real trained model on a GPU, held to transformers on the same GPU.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import eq
from typing import Any

import pytest
import torch

from paddock import LLM, SamplingParams
from tests.assets.smollm2 import FOLDER
from tests.bench import smollm2_accuracy as accuracy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not (FOLDER / "model.safetensors").is_file(), reason="`make models` fetches it"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=accuracy.NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Return 32 prompts in token ids."""
    return accuracy.prompt_ids()


@pytest.fixture(scope="module")
def exact() -> Any:
    """Return transformers' model in float32."""
    return accuracy.reference("float32", "cuda")


def _ours(prompts: list[list[int]], dtype: str) -> list[list[int]]:
    """Return each prompt with its greedy continuation, all prompts in one batch."""
    with LLM(str(FOLDER), device="cuda", dtype=dtype, max_model_len=512, kv_cache_memory_bytes=1 << 28) as llm:
        outputs = llm.generate(prompts, GREEDY)
    return [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    return next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)


def test_float32_gives_the_greedy_tokens_of_transformers(prompts: list[list[int]], exact: Any) -> None:
    """32 prompts in one batch give, token for token, what transformers gives for each of them alone."""
    assert _ours(prompts, "float32") == accuracy.continued(exact, prompts)


def test_bfloat16_leaves_transformers_only_where_its_choice_was_within_rounding(
    prompts: list[list[int]], exact: Any, record_property: Callable[[str, object], None]
) -> None:
    """Where the tokens first differ, both are as good: in float32 their logits are nearer than bfloat16 can tell.

    What bfloat16 can tell is measured at that very position: the largest error of transformers' own bfloat16 logits. Either
    library may err by as much, in either direction.
    """
    rounded = accuracy.reference("bfloat16", "cuda")
    ours, theirs = _ours(prompts, "bfloat16"), accuracy.continued(rounded, prompts)
    agreed, wrong = 0, []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        at, start = _first_difference(mine, other), len(prompts[number])
        agreed += accuracy.NEW_TOKENS if at is None else at - start
        if at is None:
            continue
        exact_V, rounded_V = (accuracy.reference_logits(model, [mine[:at]])[0][-1] for model in (exact, rounded))
        noise, gap = (exact_V - rounded_V).abs().max().item(), (exact_V[other[at]] - exact_V[mine[at]]).abs().item()
        if gap > 2 * noise:
            wrong.append(f"prompt {number}, token {at - start}: logits {gap:.3f} apart, noise {noise:.3f}")
    rate = agreed / (len(prompts) * accuracy.NEW_TOKENS)
    record_property("agreement_before_the_first_difference", rate)
    print(f"tokens before the first difference: {rate:.1%}; {sum(map(eq, ours, theirs))} of {len(prompts)} continuations equal")
    assert not wrong, wrong


def test_bfloat16_logits_are_as_near_float32_as_those_of_transformers() -> None:
    """Teacher-forced, by prefill and by decode, the error is at most 1.1 times what transformers makes in bfloat16."""
    rows = list(accuracy.table("cuda"))
    for row in rows:
        print(f"{row.library} {row.dtype} {row.way}: relative RMS {row.relative_rms:.2e}, top-1 {row.top1:.2%}")
    error = {(row.library, row.dtype, row.way): row.relative_rms for row in rows}
    for way in ("prefill", "decode"):
        assert error["paddock", "bfloat16", way] <= 1.1 * error["transformers", "bfloat16", way]
        assert error["paddock", "float32", way] < 1e-5  # the order of summation; TF32 would make it 1e-3
