"""A real trained model's quality: what the engine gives is what transformers gives, and what is known of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paddock import LLM
from paddock.evaluation import choices, compare, perplexity, read_documents
from tests.assets import evaluation_sets
from tests.assets.smollm2 import FOLDER

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not (FOLDER / "model.safetensors").is_file(), reason="`make models` fetches it"),
]
PROSE = (
    "The river rises in the hills north of the town and runs for sixty miles to the sea. In spring, when the snow melts, it "
    "floods the meadows on both sides, and the farmers move their horses to the higher fields. Until 1850 there was no "
    "bridge, and people crossed by a ferry that one family kept for five generations. Today a road and a railway follow the "
    "valley. Most of the mills that stood along the water are gone, but one of them still grinds flour for the bakers of "
    "the town.\n"
)
WITH_SETS = pytest.mark.skipif(not evaluation_sets.TEXT.is_file(), reason="`make assets` fetches the evaluation sets")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Return SmolLM2 in float32."""
    with LLM(FOLDER, device="cpu", dtype="float32", max_model_len=1025, kv_cache_memory_bytes=1 << 28) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> Any:
    """Return the same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@torch.inference_mode()
def _nats(model: Any, ids: list[int]) -> list[float]:
    logprobs_TV = model.eval()(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    found: list[float] = (-logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]).tolist()
    return found


def _ids(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text)


def test_prose_is_as_likely_as_transformers_says(llm: LLM, reference: Any) -> None:
    """The mean negative log-likelihood of two windows in float32, to 1e-4 nats."""
    ids = _ids(llm, PROSE)
    expected = [value for start in (0, 64) for value in _nats(reference, ids[start : start + 64])]
    found = perplexity(llm, PROSE, window=64, limit=2)
    assert found.tokens == len(expected) > 64
    assert found.nats == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_bfloat16_costs_little(llm: LLM) -> None:
    """Beside float32 its distributions differ, by less than a hundredth of a nat, and most first choices are the same."""
    with LLM(FOLDER, device="cpu", dtype="bfloat16", max_model_len=1025, kv_cache_memory_bytes=1 << 28) as rounded:
        found = compare(llm, rounded, PROSE, window=128)
    assert 1e-6 < found.kl < 1e-2
    assert 0.9 < found.top1 <= 1.0
    assert found.perplexity_b == pytest.approx(found.perplexity_a, rel=0.02)


@WITH_SETS
def test_wikipedia_is_as_likely_as_transformers_says(llm: LLM, reference: Any) -> None:
    """A window of 1,024 tokens of the text the benchmarks use, to 1e-4 nats."""
    text = evaluation_sets.TEXT.read_text(encoding="utf-8")[:8000]
    expected = _nats(reference, _ids(llm, text)[:1024])
    assert perplexity(llm, text, window=1024, limit=1).nats == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@WITH_SETS
def test_school_science_is_known(llm: LLM) -> None:
    """Of the first 100 easy questions 48 are right, by chance 25 would be; one or two may tip with the order of sums."""
    found = choices(llm, "arc_easy", read_documents("arc_easy", evaluation_sets.FOLDER).documents, limit=100)
    assert found.accuracy == pytest.approx(0.48, abs=0.02)
