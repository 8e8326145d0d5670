"""What a model thinks of tokens it is given: their log-probabilities, many prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paddock.errors import PaddockError
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
        raise PaddockError(f"text {index} could not be scored: {part.error or part.finish_reason}", fix="see the error named")
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [_logprob(entry, token) for token, entry in pairs]


def _logprob(entry: TokenLogprobs | None, token: int) -> float:
    assert entry is not None, "every token of a prompt but the first has a log-probability"
    return entry[token].logprob
