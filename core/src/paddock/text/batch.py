"""Many prompts through one engine: queued as it has room, each failing alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from attrs import frozen

from paddock.errors import QueueFullError, RequestError
from paddock.request import CompletionOutput, RequestOutput, SamplingParams
from paddock.text.frontend import TextEngine
from paddock.text.interrupt import interrupt_deferred
from paddock.text.prompts import EncodedPrompt, Prompt


@frozen(kw_only=True)
class Job:
    """One prompt of a batch, made when its turn comes, and asked for again when the queue was full.

    `shown` stands for it in the output when it cannot run.
    """

    request_id: str
    prompt: Callable[[], Prompt | EncodedPrompt]
    shown: object
    params: SamplingParams
    priority: int = 0


def run_batch(
    engine: TextEngine, jobs: Sequence[Job], *, final_only: bool, raising: bool = False
) -> Iterator[tuple[int, RequestOutput]]:
    """Yield (index of the job, output) as outputs come; whatever ends the iteration early aborts what still runs.

    A job that cannot run yields an output with finish_reason `error`, or raises RequestError when `raising`.
    """
    waiting = deque(enumerate(jobs))
    running: dict[str, int] = {}
    try:
        while waiting or running:
            with interrupt_deferred():
                refused = _queue(engine, waiting, running, final_only=final_only)
                outputs = engine.step() if not refused else []
            for index, error in refused:
                if raising:
                    raise error
                yield index, failed_output(jobs[index], error)
            for output in outputs:
                index = running.pop(output.request_id) if output.finished else running[output.request_id]
                yield index, output
    finally:
        for request_id in running:
            engine.abort(request_id)


def _queue(
    engine: TextEngine, waiting: deque[tuple[int, Job]], running: dict[str, int], *, final_only: bool
) -> list[tuple[int, RequestError]]:
    """Queue jobs until the engine has no room; return those it refuses for good."""
    refused: list[tuple[int, RequestError]] = []
    while waiting:
        index, job = waiting[0]
        try:
            engine.add(job.prompt(), job.params, request_id=job.request_id, priority=job.priority, final_only=final_only)
            running[job.request_id] = index
        except QueueFullError as error:
            if running:
                break
            refused.append((index, error))
        except RequestError as error:
            refused.append((index, error))
        waiting.popleft()
    return refused


def failed_output(job: Job, error: RequestError) -> RequestOutput:
    """Return the output of a job that never ran."""
    text, ids = _as_given(job.shown)
    part = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error", error=str(error))
    return RequestOutput(request_id=job.request_id, prompt=text, prompt_token_ids=ids, outputs=[part], finished=True)


def _as_given(prompt: object) -> tuple[str | None, list[int]]:
    """Return the text and the ids in a prompt, as far as it has them."""
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    else:
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    whole = isinstance(ids, Sequence) and all(isinstance(token, int) for token in ids)
    return text if isinstance(text, str) else None, list(ids) if whole and isinstance(ids, Sequence) else []
