"""A sampler with its slots, and a model whose logits depend on what the KV pages of a sequence hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from paddock.execution.batch import lay_out, send
from paddock.execution.kvcache import allocate_kv
from paddock.execution.runner import Runner, SmallSteps
from paddock.execution.sampler import Sampled, Sampler
from paddock.execution.slots import SlotTable
from paddock.layers.attention import AttentionInputs, LayerKV
from paddock.request import SamplingParams
from paddock.scheduling.step import Admission, Step

CPU = torch.device("cpu")


def admission(
    slot: int,
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    seed: int | None = 0,
    stop_ids: frozenset[int] = frozenset(),
    bad_words: Sequence[Sequence[int]] = (),
) -> Admission:
    """Return an admission with everything said."""
    return Admission(
        slot=slot,
        sequence_id=f"s{slot}#0",
        params=params,
        token_ids=[*prompt, *output],
        prompt_len=len(prompt),
        stop_ids=stop_ids,
        bad_words_ids=tuple(map(tuple, bad_words)),
        seed=seed,
    )


class SamplerBench:
    """A sampler and the slots it serves; `sample` decodes the admitted sequences in the order given."""

    def __init__(self, vocab_size: int, num_slots: int = 8, seed: int = 0) -> None:
        self.sampler = Sampler(num_slots=num_slots, vocab_size=vocab_size, device=CPU, seed=seed)
        self.slots = SlotTable(num_slots, 8192, 16)
        self.lengths: dict[int, int] = {}

    def admit(self, *admissions: Admission) -> None:
        """Take sequences."""
        for entry, features in zip(admissions, self.sampler.admit(list(admissions)), strict=True):
            self.slots.admit(entry.slot, prompt_len=entry.prompt_len, features=features)
            self.lengths[entry.slot] = len(entry.token_ids)

    def sample(self, logits_RV: torch.Tensor, slots: Sequence[int] | None = None) -> Sampled:
        """Return what the slots (all, in order) sample; each then counts one token more."""
        chosen = list(self.lengths) if slots is None else list(slots)
        step = Step(0, decode_slots=chosen, decode_positions=[self.lengths[slot] - 1 for slot in chosen])
        batch = send(lay_out(step, self.slots), self.slots, torch.zeros(64, dtype=torch.int64))
        for slot in chosen:
            self.lengths[slot] += 1
        return self.sampler.sample(logits_RV.clone(), batch.sample)

    def tokens(self, logits_RV: torch.Tensor, slots: Sequence[int] | None = None) -> list[int]:
        """Return just the tokens."""
        return self.sample(logits_RV, slots).token_R.tolist()


class PagedModel:
    """A model whose next-token logits are a fixed function of all the tokens before, read back from the KV pages.

    A token written to a wrong page, or read from one, changes every logit. It returns the rows that are wanted or, where it is
    not `sparing`, all.
    """

    def __init__(self, vocab_size: int, *, sparing: bool = True) -> None:
        self.vocab_size, self.sparing = vocab_size, sparing
        self.rows_computed: list[int] = []

    @staticmethod
    def digest(token_ids: Sequence[int]) -> int:
        """Return a number for a sequence of tokens."""
        value = 7
        for token in token_ids:
            value = (value * 31 + token + 1) % 65521
        return value

    def logits_after(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits that follow the tokens: the definition."""
        return self._row(self.digest(token_ids))

    def _row(self, digest: int) -> np.ndarray:
        return np.random.default_rng(digest).normal(size=self.vocab_size).astype(np.float32)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the continuation, token by token."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits_after(tokens).argmax()))
        return tokens[len(prompt) :]

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Return the token ids as the residual stream."""
        return token_ids_T[:, None].double()

    def forward(self, x_TE: torch.Tensor, inputs: AttentionInputs, kv: list[LayerKV]) -> torch.Tensor:
        """Return each token's digest of its sequence so far."""
        assert inputs.prepared == "prepared"
        rows = kv[0].k_pages_NPKD.flatten(0, 1)[:, 0, 0]
        rows[inputs.slots_T] = x_TE[:, 0].to(rows.dtype)
        out_TE = torch.empty_like(x_TE)
        starts, page = inputs.query_start_S1.tolist(), kv[0].page_size
        for s, (first, stop) in enumerate(pairwise(starts)):
            length = int(inputs.seq_lens_S[s])
            table = inputs.block_tables_SM[s].tolist()
            tokens = [int(rows[table[i // page] * page + i % page]) for i in range(length)]
            assert inputs.positions_T[first:stop].tolist() == list(range(length - (stop - first), length))
            for t in range(first, stop):
                out_TE[t] = self.digest(tokens[: length - (stop - 1 - t)])
        return inputs.wanted(out_TE) if self.sparing else out_TE

    def logits(self, x_RE: torch.Tensor) -> torch.Tensor:
        """Return the logits of each digest."""
        self.rows_computed.append(len(x_RE))
        return torch.from_numpy(np.stack([self._row(int(digest)) for digest in x_RE[:, 0].tolist()]))


class Prepares:
    """An attention backend that marks what it was shown."""

    def prepare(self, inputs: AttentionInputs) -> str:
        """Return the mark."""
        return "prepared"

    def attend(self, *_: object) -> torch.Tensor:
        """Never called: the model reads the pages itself."""
        raise NotImplementedError


@attrs.frozen
class Rig:
    """A runner around a `PagedModel`."""

    model: PagedModel
    runner: Runner


def paged_runner(
    small_steps: SmallSteps, *, vocab_size: int = 32, num_slots: int = 8, num_pages: int = 64, sparing: bool = True
) -> Rig:
    """Return a runner on a small paged model: pages of 4 tokens and one for padding, sequences up to 64."""
    pages = num_pages + (small_steps is SmallSteps.PADDED)
    kv = allocate_kv(num_layers=1, num_pages=pages, page_size=4, num_kv_heads=1, head_dim=1, dtype="float32", device=CPU)
    model = PagedModel(vocab_size, sparing=sparing)
    runner = Runner(
        model,
        kv,
        Prepares(),
        num_slots=num_slots,
        max_model_len=64,
        vocab_size=vocab_size,
        device=CPU,
        seed=0,
        small_steps=small_steps,
    )
    assert runner.num_pages == num_pages
    return Rig(model, runner)


@pytest.fixture(scope="session")
def admit() -> Any:
    """Give tests the admission factory."""
    return admission


@pytest.fixture(scope="session")
def sampler_bench() -> Any:
    """Give tests the sampler bench."""
    return SamplerBench


@pytest.fixture(scope="session", params=[SmallSteps.AS_THEY_COME, SmallSteps.PADDED], ids=lambda way: way.value)
def rig(request: Any) -> Any:
    """Give tests the factory of runners on a paged model, whose small steps run at their own size or at padded ones."""
    return partial(paged_runner, request.param)
