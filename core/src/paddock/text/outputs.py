"""A request while it runs: token ids arrive, text grows, outputs are read off."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, evolve, field

from paddock.request import CompletionOutput, Logprob, Request, RequestOutput, Timings, TokenLogprobs
from paddock.scheduling.step import SequenceUpdate
from paddock.text.detokenizer import Detokenizer
from paddock.text.prompts import EncodedPrompt
from paddock.text.stop import StopStrings
from paddock.text.tokenizer import Tokenizer


class LiveText:
    """The text of a growing sequence, cut at its stop string. Without a tokenizer it stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request) -> None:
        params, after = request.params, reversed(request.prompt_token_ids)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._decoder = (
            None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens, after=after)
        )
        self._parts: list[str] = []
        self._taken = 0

    @property
    def stop(self) -> str | None:
        """Return the stop string that ended the text, or None."""
        return self._stops.found

    def take(self, token_ids: list[int]) -> None:
        """Take the tokens that came since the last call, out of all of them."""
        if self._decoder is None:
            return
        for token_id in token_ids[self._taken :]:
            if self.stop is not None:
                return
            self._taken += 1
            piece = self._decoder.push(token_id)
            self._parts.append(self._stops.push(piece, armed=self._taken >= self._min_tokens))

    def finish(self) -> None:
        """End the text: nothing stays held back."""
        if self._decoder is not None and self.stop is None:
            self._parts.append(self._stops.push(self._decoder.finish()))
            self._parts.append(self._stops.finish())

    def read(self) -> str:
        """Return the text so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]


@define(eq=False, kw_only=True)
class LiveSequence:
    """One continuation. `eager` text is decoded as tokens arrive, other text when the sequence ends."""

    index: int
    request: Request
    tokenizer: Tokenizer | None
    text: LiveText
    eager: bool
    token_ids: list[int] = field(factory=list)
    token_times: list[float] = field(factory=list)
    logprobs: list[TokenLogprobs] = field(factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def take(self, update: SequenceUpdate, now: float) -> None:
        """Take one update; a stop string in its text ends the sequence here and now."""
        for token_id in update.token_ids:
            self.token_ids.append(token_id)
            self.token_times.append(now)
        if update.logprobs is not None:
            self._take_logprobs(update.logprobs, update.token_ids)
        if update.finish_reason is not None:
            self.end(update.finish_reason, update.stop_reason, update.error)
        elif self.eager:
            self.text.take(self.token_ids)
            self._end_at_stop_string()

    def end(self, reason: str, stop_reason: int | None = None, error: str | None = None) -> None:
        """End the sequence for `reason`, or at a stop string that its last tokens complete; does nothing the second time."""
        if self.finish_reason is not None:
            return
        self.text.take(self._visible(reason))
        self.text.finish()
        self._end_at_stop_string()
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def _end_at_stop_string(self) -> None:
        if self.text.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self.text.stop

    def _visible(self, reason: str) -> list[int]:
        """Return the tokens the text shows: all but a stop token, unless the request wants that too."""
        hide = reason == "stop" and not self.request.params.include_stop_str_in_output
        return self.token_ids[:-1] if hide and self.token_ids[-1] in self.request.stop_ids else self.token_ids

    def _take_logprobs(self, logprobs: TokenLogprobs, token_ids: list[int]) -> None:
        self.logprobs.append(spelt(logprobs, self.tokenizer))
        self.cumulative_logprob += sum(logprobs[token_id].logprob for token_id in token_ids if token_id in logprobs)

    def output(self) -> CompletionOutput:
        """Return a copy of the state."""
        wanted = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text.read(),
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=list(self.logprobs) if wanted else None,
            cumulative_logprob=self.cumulative_logprob if wanted else None,
            error=self.error,
            token_times=list(self.token_times),
        )


@define(eq=False, kw_only=True)
class LiveRequest:
    """A request and its n continuations. Times are in monotonic seconds; `scheduled` is the engine's clock, the same one."""

    request_id: str
    prompt: EncodedPrompt
    prompt_token_ids: list[int]  # one list for all its outputs: a long prompt is not copied with every token
    sequences: list[LiveSequence]
    final_only: bool
    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @classmethod
    def of(
        cls, request: Request, prompt: EncodedPrompt, tokenizer: Tokenizer | None, *, final_only: bool, arrived: float
    ) -> LiveRequest:
        """Return a request of which nothing has run; text grows with every token unless only its end is wanted."""
        eager = bool(request.params.stop) or not final_only
        sequences = [
            LiveSequence(index=index, request=request, tokenizer=tokenizer, text=LiveText(tokenizer, request), eager=eager)
            for index in range(request.params.n)
        ]
        return cls(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=list(prompt.token_ids),
            sequences=sequences,
            final_only=final_only,
            arrived=arrived,
        )

    def take(self, update: SequenceUpdate, now: float) -> None:
        """Take one update of one of its continuations."""
        sequence = self.sequences[update.index]
        sequence.take(update, now)
        if self.scheduled is None:
            self.scheduled = update.first_scheduled
        if self.first_token is None and update.token_ids:
            self.first_token = now
        if update.prompt_logprobs is not None:
            tokenizer = sequence.tokenizer
            self.prompt_logprobs = [entry and spelt(entry, tokenizer) for entry in update.prompt_logprobs]
        if update.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = update.num_cached_tokens
        if sequence.finish_reason is not None and self.done:
            self.finished = now

    @property
    def done(self) -> bool:
        """Return whether every continuation has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """Return a copy of the state; the prompt's ids alone are shared."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.done,
            prompt_logprobs=self.prompt_logprobs,
            timings=Timings(arrived=self.arrived, scheduled=self.scheduled, first_token=self.first_token, finished=self.finished),
            num_cached_tokens=self.num_cached_tokens,
        )


def spelt(logprobs: Mapping[int, Logprob], tokenizer: Tokenizer | None) -> TokenLogprobs:
    """Return the logprobs with each token's text, where there is a tokenizer."""
    if tokenizer is None:
        return dict(logprobs)
    return {token: evolve(entry, decoded_token=tokenizer.token_text(token)) for token, entry in logprobs.items()}
