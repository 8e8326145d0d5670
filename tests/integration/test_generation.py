"""A random tiny Llama through scheduler, runner and engine: what comes out is what one full forward after the other gives."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.errors import RequestError
from paddock.execution.engine import Engine
from paddock.execution.kvcache import allocate_kv
from paddock.execution.runner import Runner
from paddock.request import Request, SamplingParams
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler
from paddock.scheduling.step import SequenceUpdate
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


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.2, top_p=0.95, seed=11, max_tokens=12),
        SamplingParams(temperature=0.5, frequency_penalty=2.0, repetition_penalty=1.5, seed=12, max_tokens=40),
    ],
)
def test_seeded_requests_repeat_in_any_company(params: SamplingParams) -> None:
    """Drawn tokens of a seeded request are the same alone and among seven others, preempted on the way."""
    alone = [generate(engine(num_pages=64, max_num_batched_tokens=64), [prompt], params)[0] for prompt in PROMPTS]
    for num_pages in (18, 24):
        assert generate(engine(num_pages=num_pages, max_num_batched_tokens=9), PROMPTS, params) == alone
    greedy = evolve(params, temperature=0.0)
    assert alone != generate(engine(num_pages=64, max_num_batched_tokens=64), PROMPTS, greedy)


sampling = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 2]),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 7]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    frequency_penalty=st.sampled_from([0.0, 0.9]),
    logit_bias=st.sampled_from([{}, {3: 9.0, 4: -9.0}]),
    max_tokens=st.sampled_from([1, 9, 20, None]),
    min_tokens=st.sampled_from([0, 1]),
    stop_token_ids=st.sampled_from([[], list(range(0, VOCAB, 9))]),
    seed=st.integers(0, 2**64),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, 0, 2]),
)
prompts = st.one_of(
    st.sampled_from(PROMPTS), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_LEN - 1), st.just(SHARED * 7)
)
jobs = st.tuples(prompts, sampling, st.integers(0, 2), st.one_of(st.none(), st.integers(1, 12)))
Answers = dict[tuple[str, int], list[SequenceUpdate]]


def answers(run: Engine, asked: list[tuple[list[int], SamplingParams, int, int | None]]) -> Answers:
    """Return each sequence's updates; a request is (prompt, parameters, priority, the turn in which it is aborted)."""
    found: Answers = {(str(i), index): [] for i, job in enumerate(asked) for index in range(job[1].n)}
    for i, (prompt, params, priority, _) in enumerate(asked):
        run.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), params=params, priority=priority))
    turn = 0
    while run.has_work:
        turn += 1
        aborted = [update for i, job in enumerate(asked) if job[3] == turn for update in run.abort(str(i))]
        for update in aborted + run.step():
            found[update.request_id, update.index].append(update)
    return found


def logprob_values(updates: list[SequenceUpdate]) -> list[float]:
    """Return every log-probability in the updates, the prompt's first."""
    prompt = [row for update in updates for row in update.prompt_logprobs or [] if row]
    rows = prompt + [update.logprobs for update in updates if update.logprobs]
    return [entry.logprob for row in rows for entry in row.values()]


@settings(max_examples=25, deadline=None)
@given(asked=st.lists(jobs, min_size=2, max_size=6), num_pages=st.sampled_from([16, 19]), budget=st.sampled_from([5, 40]))
def test_no_request_notices_its_neighbours(
    asked: list[tuple[list[int], SamplingParams, int, int | None]], num_pages: int, budget: int
) -> None:
    """Sampled in any way, chunked, preempted and shared, aborted around, each gets the tokens and logprobs it gets alone."""
    crowd = answers(engine(num_pages=num_pages, max_num_batched_tokens=budget), asked)
    for i, (prompt, params, _, aborted) in enumerate(asked):
        alone = answers(engine(num_pages=64, max_num_batched_tokens=64, enable_prefix_caching=False), [(prompt, params, 0, None)])
        for index in range(params.n):
            expected, found = alone["0", index], crowd[str(i), index]
            tokens = [token for update in expected for token in update.token_ids]
            came = [token for update in found for token in update.token_ids]
            assert came == tokens[: len(came)]
            if aborted is None or found[-1].finish_reason != "abort":
                assert came == tokens
                assert (found[-1].finish_reason, found[-1].stop_reason) == (expected[-1].finish_reason, expected[-1].stop_reason)
                assert logprob_values(found) == pytest.approx(logprob_values(expected), abs=1e-4)


def test_a_prompt_one_short_of_the_limit_gets_one_token() -> None:
    """Prompt and answer fill max_model_len exactly, whatever max_tokens allows; a longer prompt is refused."""
    run, prompt = engine(num_pages=16, max_num_batched_tokens=64), [5] * (MAX_LEN - 1)
    assert generate(run, [prompt], SamplingParams(temperature=0.0, max_tokens=None)) == [list(continuation(tuple(prompt), 1))]
    assert [len(tokens) for tokens in generate(run, [[5], [6] * 40], SamplingParams(max_tokens=None))] == [
        MAX_LEN - 1,
        MAX_LEN - 40,
    ]
    with pytest.raises(RequestError, match="64 tokens: max_model_len 64"):
        generate(run, [[5] * MAX_LEN], SamplingParams())
