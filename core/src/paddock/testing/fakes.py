"""A model of one line and a runner that believes nothing: what scheduling and the engine are tested with. Free of torch.

The fake model's K and V of a position is a number made of all tokens up to it. The runner keeps these numbers in pages as a
real one would keep tensors, and before it samples it reads every row the sequence attends to. A page shared wrongly, reused
too early, granted twice or not at all, a token lost or fed at the wrong position: each fails an assertion in the step where
it matters.
"""

from __future__ import annotations

from attrs import define, field

from paddock.request import Logprob, SamplingParams, TokenLogprobs
from paddock.scheduling.step import NOT_FINITE, Admission, PrefillChunk, Step, StepResult

_PRIME = (1 << 61) - 1
_START = 7


@define(kw_only=True)
class FakeModel:
    """Defines a next token for every history. One state in `not_finite_every` has unusable logits (0: none)."""

    vocab_size: int = 11
    not_finite_every: int = 0

    def states(self, token_ids: list[int]) -> list[int]:
        """Return for every position the number that stands for its K and V: it depends on all tokens up to there."""
        state, states = _START, []
        for token in token_ids:
            state = (state * 1_000_003 + token + 1) % _PRIME
            states.append(state)
        return states

    def sample(self, state: int, seed: int | None) -> int:
        """Return the token after a history that ends in `state`, or NOT_FINITE."""
        if self.not_finite_every and state % self.not_finite_every == 0:
            return NOT_FINITE
        return (state * 31 + (seed or 0) * 17) % 1_000_033 % self.vocab_size

    def logprobs(self, state: int, token: int) -> TokenLogprobs:
        """Return the logprobs of `token` after a history that ends in `state`."""
        return {token: Logprob(-float((state + token) % 97) / 8.0, 1 + (state + token) % self.vocab_size)}

    def generate(self, token_ids: list[int], count: int, seed: int | None = None) -> list[int]:
        """Return the next `count` tokens, or fewer if the logits become unusable, which the last one then marks."""
        known = list(token_ids)
        for _ in range(count):
            known.append(self.sample(self.states(known)[-1], seed))
            if known[-1] == NOT_FINITE:
                break
        return known[len(token_ids) :]


@define
class _Slot:
    """A sequence as the device sees it."""

    history: list[int]  # every token, sampled ones included, as on the device
    states: list[int]  # of the history
    params: SamplingParams
    seed: int | None
    prompt_len: int
    pages: list[int] = field(factory=list)
    computed: int | None = None  # unknown until the first chunk says how much was cached


@define
class FakeInFlight:
    """A step that has run, with its result."""

    step: Step
    _result: StepResult

    def result(self) -> StepResult:
        """Return what the step sampled."""
        return self._result


@define(kw_only=True)
class FakeRunner:
    """Runs steps strictly in order on a FakeModel; `overlaps` tells the engine that it may run one step ahead."""

    model: FakeModel
    num_slots: int
    num_pages: int
    page_size: int
    max_num_batched_tokens: int
    overlaps: bool = False
    num_launched: int = 0
    num_tokens: int = 0  # computed so far, over all steps
    num_recovered: int = 0  # times it was told to recover
    _slots: dict[int, _Slot] = field(factory=dict)
    _rows: dict[int, int] = field(factory=dict)  # page * page_size + row -> K and V

    @property
    def vocab_size(self) -> int:
        """Return the model's."""
        return self.model.vocab_size

    def close(self) -> None:
        """Hold nothing, release nothing."""

    def memory_use(self) -> None:
        """Count no memory."""

    def watch_prompts(self, watcher: object) -> None:
        """Have no logits to show."""

    def recover(self) -> None:
        """Count."""
        self.num_recovered += 1

    def launch(self, step: Step) -> FakeInFlight:
        """Run the step and return its result in flight; raise AssertionError for anything a device could not do rightly."""
        assert step.number == self.num_launched, f"step {step.number} follows {self.num_launched - 1}"
        assert 0 < step.num_tokens <= self.max_num_batched_tokens, f"a step of {step.num_tokens} tokens"
        self.num_launched += 1
        self.num_tokens += step.num_tokens
        for admission in step.admissions:
            self._admit(admission)
        for slot, first, pages in step.pages:
            self._grant(slot, first, pages)
        runs = [*self._decodes(step), *((chunk.slot, chunk.start, chunk.token_ids) for chunk in step.prefills)]
        assert len({slot for slot, _, _ in runs}) == len(runs), "a slot runs twice in a step"
        for slot, start, token_ids in runs:
            self._write(self._slots[slot], start, token_ids)
        for slot, start, token_ids in runs:
            self._read(self._slots[slot], start + len(token_ids))
        return FakeInFlight(step, self._sample(step))

    def _admit(self, admission: Admission) -> None:
        assert 0 <= admission.slot < self.num_slots, f"slot {admission.slot} of {self.num_slots}"
        assert 0 < admission.prompt_len <= len(admission.token_ids), "a prompt is cut"
        known = list(admission.token_ids)
        states = self.model.states(known)
        self._slots[admission.slot] = _Slot(known, states, admission.params, admission.seed, admission.prompt_len)

    def _grant(self, slot: int, first: int, pages: list[int]) -> None:
        held = self._slots[slot].pages
        assert first == len(held), f"pages from {first} on are granted to a slot that has {len(held)}"
        assert pages, "nothing is granted"
        held += pages
        assert len(set(held)) == len(held), "a sequence has a page twice"
        assert all(0 <= page < self.num_pages for page in pages), "a page is granted that does not exist"

    def _decodes(self, step: Step) -> list[tuple[int, int, list[int]]]:
        runs = []
        for slot, position in zip(step.decode_slots, step.decode_positions, strict=True):
            history = self._slots[slot].history
            assert position == len(history) - 1, f"the token at {position} is fed, {len(history)} are known"
            runs.append((slot, position, history[position:]))
        return runs

    def _write(self, state: _Slot, start: int, token_ids: list[int]) -> None:
        end = start + len(token_ids)
        assert token_ids, "a sequence runs without a token"
        assert token_ids == state.history[start:end], "the tokens fed are not the sequence's"
        assert state.computed in (None, start), f"position {start} follows {state.computed} computed ones"
        for position in range(start, end):
            page = state.pages[position // self.page_size]
            self._rows[page * self.page_size + position % self.page_size] = state.states[position]
        state.computed = end

    def _read(self, state: _Slot, end: int) -> None:
        for position in range(end):
            row = state.pages[position // self.page_size] * self.page_size + position % self.page_size
            assert self._rows.get(row) == state.states[position], f"position {position} reads somebody else's K and V"

    def _sample(self, step: Step) -> StepResult:
        result = StepResult([])
        for slot in step.decode_slots:
            self._sample_slot(self._slots[slot], result)
        for i, chunk in enumerate(step.prefills):
            state = self._slots[chunk.slot]
            self._prompt_logprobs(i, chunk, state, result)
            assert chunk.samples == (state.computed == len(state.history)), "a chunk samples exactly if it is the last"
            if chunk.samples:
                self._sample_slot(state, result)
        return result

    def _sample_slot(self, state: _Slot, result: StepResult) -> None:
        token = self.model.sample(state.states[-1], state.seed)
        if state.params.logprobs is not None:
            result.logprobs[len(result.token_ids)] = self.model.logprobs(state.states[-1], token)
        result.token_ids.append(token)
        state.history.append(token)
        state.states.append((state.states[-1] * 1_000_003 + token + 1) % _PRIME)

    def _prompt_logprobs(self, i: int, chunk: PrefillChunk, state: _Slot, result: StepResult) -> None:
        if state.params.prompt_logprobs is None:
            return
        positions = range(chunk.start, min(chunk.start + len(chunk.token_ids), len(state.history) - 1))
        result.prompt_logprobs[i] = [self.model.logprobs(state.states[p], state.history[p + 1]) for p in positions]
