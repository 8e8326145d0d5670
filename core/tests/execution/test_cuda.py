"""On a GPU: the same tokens as on a CPU, and no launch that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from paddock.execution import randomness
from paddock.execution.engine import Engine
from paddock.execution.kvcache import allocate_kv
from paddock.execution.runner import Runner
from paddock.request import Request, SamplingParams
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
VOCAB = 3072
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "filtered": {"temperature": 1.1, "top_p": 0.8, "min_p": 0.001},
    "top_k": {"top_k": 40},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "edited": {"temperature": 0.0, "logit_bias": {5: 3.0, 9: -4.0}, "min_tokens": 4, "stop_token_ids": [7]},
    "logprobs": {"temperature": 0.7, "logprobs": 3, "prompt_logprobs": 2},
}


class Markov:
    """A model whose logits are a row of a table, chosen by the last token: random, with no two near the top alike."""

    def __init__(self, device: torch.device) -> None:
        self.table_VV = (3 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))).to(device)

    def embed(self, token_ids_T: Any) -> Any:
        """Return the token ids as the residual stream."""
        return token_ids_T[:, None].to(torch.float32)

    def forward(self, x_TE: Any, inputs: Any, kv: Any) -> Any:
        """Return the residual stream unchanged."""
        return x_TE

    def logits(self, x_RE: Any) -> Any:
        """Return the rows of the table."""
        return self.table_VV.index_select(0, x_RE[:, 0].to(torch.int64))

    def prepare(self, inputs: Any) -> None:
        """Serve as attention backend too."""


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Let any synchronisation raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(device: torch.device) -> Any:
    """Return every request's tokens and logprobs, from an engine on the device."""
    kv = allocate_kv(num_layers=1, num_pages=64, page_size=4, num_kv_heads=1, head_dim=1, dtype="float32", device=device)
    model: Any = Markov(device)
    runner = Runner(model, kv, model, num_slots=8, max_model_len=64, vocab_size=VOCAB, device=device, seed=3)
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, num_pages=64, page_size=4)
    engine = Engine(Scheduler(limits), runner)
    assert runner.overlaps == (device.type == "cuda")
    for number, (name, options) in enumerate(KINDS.items()):
        params = SamplingParams(max_tokens=12, ignore_eos=True, seed=number if number % 2 else None, **options)
        prompt = tuple(range(number, number + 9))
        bad_words = ((11, 12), (13,)) if name == "edited" else ()
        engine.add(Request(request_id=name, prompt_token_ids=prompt, params=params, bad_words_ids=bad_words))
    launch = runner.launch

    def launch_without_waiting(step: Any) -> Any:
        with waiting_is_an_error():
            return launch(step)

    if runner.overlaps:
        runner.launch = launch_without_waiting  # type: ignore[method-assign]
    tokens: dict[str, list[int]] = {}
    logprobs: list[Any] = []
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
            logprobs += [*(update.prompt_logprobs or []), update.logprobs]
    engine.close()
    return tokens, [(token, entry) for row in logprobs if row for token, entry in row.items()]


def test_gpu_and_cpu_sample_the_same_tokens_and_no_launch_waits() -> None:
    """Every kind of sampling, overlapped and mixed in one batch, gives a CPU's tokens, ranks and logprobs."""
    (ours, our_logprobs), (theirs, their_logprobs) = run(torch.device("cuda")), run(torch.device("cpu"))
    assert ours == theirs
    assert [(token, entry.rank) for token, entry in our_logprobs] == [(token, entry.rank) for token, entry in their_logprobs]
    for (_, one), (_, other) in zip(our_logprobs, their_logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_noise_bits_are_the_same_on_a_gpu() -> None:
    """The hash gives a CPU's bits."""
    words = torch.tensor([randomness.seed_words(seed) for seed in range(5)], dtype=torch.int32)
    index = torch.arange(5, dtype=torch.int32) * 1000
    cpu = randomness.noise_bits(words, index, randomness.token_terms(VOCAB, torch.device("cpu")))
    gpu = randomness.noise_bits(words.cuda(), index.cuda(), randomness.token_terms(VOCAB, torch.device("cuda")))
    assert torch.equal(cpu, gpu.cpu())
