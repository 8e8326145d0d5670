"""What a model thinks of tokens it is given: their log-probabilities, many prompts at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from attrs import frozen

from paddock.errors import PaddockError
from paddock.evaluation.texts import Progress
from paddock.llm import LLM
from paddock.request import RequestOutput, SamplingParams, TokenLogprobs

_SCORING = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)


def scored(llm: LLM, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
    """Yield (index of a prompt, natural log-probability of each of its tokens but the first), as prompts come out of the engine.

    Every prompt has at least two tokens. Raises PaddockError where one fails, or where its logits are not finite.
    """
    for output in llm.stream([list(prompt) for prompt in prompts], _SCORING):
        if output.finished:
            index = int(output.request_id.rpartition("-")[2])
            yield index, _logprobs(output, index)


def _logprobs(output: RequestOutput, index: int) -> list[float]:
    part = output.outputs[0]
    if part.error is not None or output.prompt_logprobs is None:
        reason, _, fix = (part.error or f"it ended with {part.finish_reason!r}").partition("\n  fix: ")
        raise PaddockError(f"prompt {index} could not be scored: {reason}", fix=fix or "try another dtype or backend")
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [_logprob(entry, token) for token, entry in pairs]


def _logprob(entry: TokenLogprobs | None, token: int) -> float:
    assert entry is not None, "every token of a prompt but the first has a log-probability"
    return entry[token].logprob


@frozen
class Pair:
    """A context and its continuation in token ids, at least one each; `cut` when the beginning of the context was left out."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    cut: bool = False


def continuation_logprobs(llm: LLM, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[float]:
    """Return the log-likelihood of each pair's continuation after its context, in nats.

    Continuations of one token after the same context, such as letters, are read off one prompt. `progress` is called with the
    pairs scored and those in all. Raises PaddockError as `scored` does, and where a log-likelihood is NaN.
    """
    from paddock.evaluation.last_rows import LastRows  # imports torch, which the LLM has by now

    prompts = _shared_prompts(pairs)
    several = {
        number: (len(pairs[members[0]].context) - 1, [pairs[i].continuation[0] for i in members])
        for number, members in enumerate(prompts)
        if len(members) > 1
    }
    rows = LastRows(several)
    found = [math.nan] * len(pairs)
    done = 0
    with llm.watching_prompts(rows.watch):
        for number, logprobs in scored(llm, [[*pairs[i].context, *pairs[i].continuation] for i, *_ in prompts]):
            members = prompts[number]
            if number in several:
                each = rows.logprobs(number)
            else:
                each = [math.fsum(logprobs[-len(pairs[members[0]].continuation) :])]
            for i, value in zip(members, each, strict=True):
                found[i] = value
            done += len(members)
            if progress is not None:
                progress(done, len(pairs))
    if any(map(math.isnan, found)):
        raise PaddockError("a log-likelihood is NaN: the model's logits are not finite", fix="try another dtype")
    return found


def _shared_prompts(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the pairs that one prompt serves, for each prompt; the first of them is what is prompted."""
    prompts: list[list[int]] = []
    of_context: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        if len(pair.continuation) > 1:
            prompts.append([i])
        elif pair.context in of_context:
            of_context[pair.context].append(i)
        else:
            of_context[pair.context] = [i]
            prompts.append(of_context[pair.context])
    return prompts
