"""A random tiny Llama through scheduler, runner and engine: what comes out is what one full forward after the other gives."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from paddock.execution.engine import Engine
from paddock.execution.kvcache import allocate_kv
from paddock.execution.runner import Runner
from paddock.request import Request, SamplingParams
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler
from paddock.testing.contracts import BuiltModel, build_model
from paddock_llama.plugin import paddock_models

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
VOCAB, MAX_LEN, PAGE = 96, 64, 4
CHANCE = random.Random(3)
SHARED = [CHANCE.randrange(VOCAB) for _ in range(9)]  # a prefix that some prompts have in common
PROMPTS = [SHARED[: 9 * (i % 2)] + [CHANCE.randrange(VOCAB) for _ in range(1 + i * 3 % 13)] for i in range(8)]


@cache
def tiny() -> BuiltModel:
    """Return the model."""
    (spec,) = paddock_models()
    return build_model(spec, TINY, max_model_len=MAX_LEN, seed=5)


@cache
def continuation(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the greedy continuation, every token from a forward over all tokens before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(tiny().run([("alone", tokens)])["alone"][-1].argmax()))
    return tuple(tokens[len(prompt) :])


def engine(*, num_pages: int, max_num_batched_tokens: int, enable_prefix_caching: bool = True) -> Engine:
    """Return an engine on the tiny model, four sequences at most."""
    built = tiny()
    limits = SchedulerLimits(
        max_num_seqs=4,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=MAX_LEN,
        num_pages=num_pages,
        page_size=PAGE,
        enable_prefix_caching=enable_prefix_caching,
    )
    kv = allocate_kv(
        num_layers=2, num_pages=num_pages, page_size=PAGE, num_kv_heads=2, head_dim=8, dtype="float32", device=torch.device("cpu")
    )
    runner = Runner(
        built.model,
        kv,
        built.backend,
        num_slots=4,
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        seed=0,
    )
    return Engine(Scheduler(limits), runner)


def generate(run: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Return each prompt's tokens."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(tokens, prompts, strict=True):
        run.add(Request(request_id=name, prompt_token_ids=tuple(prompt), params=params))
    while run.has_work:
        for update in run.step():
            assert update.error is None
            tokens[update.request_id] += update.token_ids
    return list(tokens.values())


@pytest.mark.parametrize("num_pages", [17, 64])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 64])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_a_crowd_gets_what_each_gets_alone(num_pages: int, max_num_batched_tokens: int, enable_prefix_caching: bool) -> None:
    """Chunked, preempted, resumed and shared or not, every request gets the greedy tokens of full forwards."""
    run = engine(num_pages=num_pages, max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=enable_prefix_caching)
    found = generate(run, PROMPTS, SamplingParams(temperature=0.0, max_tokens=16))
    assert found == [list(continuation(tuple(prompt), 16)) for prompt in PROMPTS]


def test_seeded_requests_repeat_in_any_company() -> None:
    """Drawn tokens of a seeded request are the same alone and among seven others."""
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=11, max_tokens=12)
    alone = [generate(engine(num_pages=64, max_num_batched_tokens=64), [prompt], params)[0] for prompt in PROMPTS]
    assert generate(engine(num_pages=24, max_num_batched_tokens=9), PROMPTS, params) == alone
    assert alone != [list(continuation(tuple(prompt), 12)) for prompt in PROMPTS]
