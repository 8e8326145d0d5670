"""A real trained model on a CPU, held to transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from paddock import LLM, SamplingParams
from tests.assets.smollm2 import FOLDER

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not (FOLDER / "model.safetensors").is_file(), reason="`make models` fetches it"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
CHAT = [
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome."},
    {"role": "user", "content": "And of  France? 🐎\n"},
]
WORDS = (
    "the",
    "a",
    "river",
    "house",
    "seven",
    "quickly",
    "because",
    "🐎",
    "naïve",
    "東京",
    "of",
    "def",
    "return",
    "42",
    "Paris;",
    "\n",
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Return SmolLM2 in float32."""
    with LLM(FOLDER, device="cpu", dtype="float32", max_model_len=512, kv_cache_memory_bytes=1 << 28) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> Any:
    """Return the same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference_tokenizer() -> Any:
    """Return the same tokenizer in transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def _prompts() -> list[str]:
    """Return 32 prompts of 1 to 63 words."""
    draw = random.Random(11)
    return [" ".join(draw.choice(WORDS) for _ in range(1 + 2 * i)) for i in range(32)]


def test_a_batch_of_mixed_lengths_gives_the_greedy_tokens_of_transformers(llm: LLM, reference: Any) -> None:
    """32 requests in one batch give what transformers finds likeliest, token by token, for each of them alone, in float32.

    One pass of transformers over a request and its answer says of each token whether it is the likeliest after all before it.
    """
    outputs = llm.generate(_prompts(), GREEDY)
    assert len({len(output.prompt_token_ids) for output in outputs}) > 20
    ends = {*torch.tensor(reference.generation_config.eos_token_id).view(-1).tolist()}
    for output in outputs:
        ids = [*output.prompt_token_ids, *output.token_ids]
        with torch.inference_mode():
            logits_TV = reference(torch.tensor([ids[:-1]]), logits_to_keep=len(output.token_ids)).logits[0]
        assert output.token_ids == logits_TV.argmax(-1).tolist()
        assert len(output.token_ids) == GREEDY.max_tokens or output.token_ids[-1] in ends
        assert not ends & {*output.token_ids[:-1]}


def test_the_tokenizer_agrees_with_transformers(llm: LLM, reference_tokenizer: Any) -> None:
    """Encoding and decoding, special tokens included, are the same."""
    assert llm.tokenizer is not None
    for text in [*_prompts(), "<|im_start|>user\nHi<|im_end|>", "  two  spaces ", "\t\n"]:
        ids = reference_tokenizer(text).input_ids
        assert llm.tokenizer.encode(text) == ids
        for skip in (True, False):
            theirs = reference_tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert llm.tokenizer.decode(ids, skip_special_tokens=skip) == theirs


def test_the_chat_prompt_is_that_of_transformers(llm: LLM, reference_tokenizer: Any) -> None:
    """The template renders to the same text, with and without the cue to answer."""
    for cue in (True, False):
        theirs = reference_tokenizer.apply_chat_template(CHAT, add_generation_prompt=cue, tokenize=False)
        prompt = llm.chat_prompt(CHAT, add_generation_prompt=cue)
        assert prompt["prompt"] == theirs
        assert prompt["prompt_token_ids"] == reference_tokenizer(theirs, add_special_tokens=False).input_ids


def test_a_streamed_chat_is_the_chat(llm: LLM) -> None:
    """Streaming a conversation's prompt ends with the answer that chat gives, growing on the way."""
    (whole,) = llm.chat(CHAT, GREEDY)
    streamed = list(llm.stream(llm.chat_prompt(CHAT), GREEDY))
    assert streamed[-1].text == whole.text
    assert streamed[-1].token_ids == whole.token_ids
    assert all(after.text.startswith(before.text) for before, after in pairwise(streamed))


def test_an_answer_ends_at_its_end_of_turn(llm: LLM) -> None:
    """A short question gets a short answer, ended by the model and not by the limit."""
    params = SamplingParams(temperature=0.0, max_tokens=64)
    (output,) = llm.chat([{"role": "user", "content": "Say hello."}], params)
    assert output.finish_reason == "stop"
    assert "<|im_end|>" not in output.text
