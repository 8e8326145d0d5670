"""The Python front door: a model, prompts, answers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from paddock.begin import import_assemble
from paddock.config import EngineConfig
from paddock.errors import CheckpointError, PaddockError, RequestError
from paddock.execution.memory import MemoryUse
from paddock.progress import byte_progress, request_progress
from paddock.request import RequestOutput, SamplingParams
from paddock.text.batch import Job, run_batch
from paddock.text.chat import Message
from paddock.text.frontend import TextEngine
from paddock.text.prompts import EncodedPrompt, Prompt, as_list
from paddock.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from paddock.execution.prompt_logprobs import PromptWatcher

Prompts = Prompt | Sequence[Prompt]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to answer. Names follow vLLM's.

    `model` is a folder or a hub id; `options` are the fields of `EngineConfig`; `plugins` are plugin objects used beside the
    installed ones, or instead of them when `autoload` is False. An unknown option is an OptionError with the nearest name.
    `progress` None shows how loading goes when standard error is a terminal.
    One caller at a time: calling it while it generates, in another thread or an unfinished stream, is a PaddockError.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        plugins: Sequence[object] = (),
        autoload: bool = True,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options(fspath(model), **options)
        assemble = import_assemble(config.device)
        with byte_progress("weights", shown=progress) as advance:
            self._hold(assemble(config, plugins=plugins, autoload=autoload, progress=advance))

    @classmethod
    def from_engine(cls, engine: TextEngine) -> Self:
        """Return an LLM over an engine assembled elsewhere; closing the one closes the other."""
        llm = cls.__new__(cls)
        llm._hold(engine)
        return llm

    def _hold(self, engine: TextEngine) -> None:
        self._engine = engine
        self._closed = False
        self._turn = threading.Lock()
        self._turn_thread: int | None = None
        self._calls = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None where only token ids go in and out."""
        return self._engine.tokenizer

    @property
    def plan(self) -> Any:
        """Return the Plan the engine was built from."""
        return self._engine.plan

    def memory_use(self) -> MemoryUse | None:
        """Return what the engine really takes of a GPU's memory, beside what `plan.ledger` predicted; None on a CPU."""
        return self._engine.memory_use()

    @contextmanager
    def watching_prompts(self, watcher: PromptWatcher) -> Iterator[None]:
        """Show `watcher` all logits of every prompt that runs meanwhile and whose sampling has `prompt_logprobs`.

        It is called as `watcher(sequence_id, position, logits_RV)`: float32 on the model's device, at most 64 MiB a call or one
        row, row r predicting the prompt's token at `position + r + 1`. The same rows may come twice.
        """
        self._need_open()
        self._engine.watch_prompts(watcher)
        try:
            yield
        finally:
            self._engine.watch_prompts(None)

    @property
    def max_model_len(self) -> int:
        """Return how many tokens a prompt and its continuation may have together."""
        return self._engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """Return how many token ids the model knows."""
        return self._engine.vocab_size

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling the model's generation_config.json recommends; SamplingParams() where it says nothing.

        Raises CheckpointError where it recommends what cannot be.
        """
        try:
            return SamplingParams(**self._engine.sampling_defaults)
        except RequestError as error:
            fix = "correct the file, or give sampling_params"
            raise CheckpointError(f"generation_config.json: {error.message}", fix=fix) from None

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Return one finished output a prompt, in the order of the prompts.

        A prompt is a text, a list of token ids, or a mapping with `prompt` or `prompt_token_ids`; `sampling_params`
        (get_default_sampling_params() when None) is one for all or one each, and so is `priority`, lower running earlier. In a
        list, a prompt that cannot run gives an output with finish_reason `error`; given alone, it raises RequestError. Ctrl-C
        aborts all of them. `progress` None shows a bar when standard error is a terminal.
        """
        each, single = as_list(prompts)
        jobs = self._jobs(each, [partial(_given, prompt) for prompt in each], sampling_params, priority)
        return self._finish(jobs, raising=single, progress=progress)

    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Return the answer to one conversation (a list of messages), or to each of several, as `generate` does.

        `chat_template` is a template or the name of one of the model's; `chat_template_kwargs` are further names for it.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages

        render = partial(
            self._engine.chat_prompt,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            tools=tools,
            variables=chat_template_kwargs,
        )
        jobs = self._jobs(conversations, [partial(render, each) for each in conversations], sampling_params, None)
        return self._finish(jobs, raising=single, progress=progress)

    def chat_prompt(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> dict[str, Any]:
        """Return a conversation as a prompt for `generate` and `stream`, in text and token ids."""
        self._need_open()
        return self._engine.chat_prompt(messages, add_generation_prompt=add_generation_prompt)

    def stream(
        self, prompts: Prompts, sampling_params: Params = None, *, priority: Sequence[int] | None = None
    ) -> Iterator[RequestOutput]:
        """Return an iterator over outputs as they grow, each with all its text so far (cumulative, as vLLM's).

        Outputs of several prompts come mixed; their request ids end in `-0`, `-1`, ... in the order of the prompts. A prompt
        that cannot run behaves as in `generate`. Leaving the iterator early aborts what still runs.
        """
        each, single = as_list(prompts)
        jobs = self._jobs(each, [partial(_given, prompt) for prompt in each], sampling_params, priority)
        return self._streamed(jobs, raising=single)

    def _streamed(self, jobs: Sequence[Job], *, raising: bool) -> Iterator[RequestOutput]:
        with self._taking_turn():
            for _, output in run_batch(self._engine, jobs, final_only=False, raising=raising):
                yield output

    def _finish(self, jobs: Sequence[Job], *, raising: bool, progress: bool | None) -> list[RequestOutput]:
        done: dict[int, RequestOutput] = {}
        with self._taking_turn(), request_progress(len(jobs), shown=progress) as advance:
            for index, output in run_batch(self._engine, jobs, final_only=True, raising=raising):
                done[index] = output
                advance(output)
        return [done[index] for index in range(len(jobs))]

    def _jobs(
        self,
        shown: Sequence[Any],
        makers: Sequence[Callable[[], Prompt]],
        sampling_params: Params,
        priority: Sequence[int] | None,
    ) -> list[Job]:
        self._need_open()
        params = _one_each(self.get_default_sampling_params() if sampling_params is None else sampling_params, len(shown))
        if priority is not None and len(priority) != len(shown):
            raise RequestError(f"{len(shown)} prompts and {len(priority)} priorities", fix="give one priority a prompt")
        call = next(self._calls)
        return [
            Job(
                request_id=f"{call}-{i}",
                prompt=cache(partial(self._encoded, make)),
                shown=shown[i],
                params=params[i],
                priority=priority[i] if priority else 0,
            )
            for i, make in enumerate(makers)
        ]

    def _encoded(self, make: Callable[[], Prompt]) -> EncodedPrompt:
        return self._engine.encode(make())

    @contextmanager
    def _taking_turn(self) -> Iterator[None]:
        self._need_open()
        if not self._turn.acquire(blocking=False):
            raise PaddockError(
                "the LLM is generating already, in another thread or in a stream that is not finished",
                fix="finish or close that first, or give all prompts in one call: they run at once",
            )
        self._turn_thread = threading.get_ident()
        try:
            yield
        finally:
            self._turn_thread = None
            self._turn.release()

    def _need_open(self) -> None:
        if self._closed:
            raise PaddockError("the LLM is closed", fix="make another LLM")

    def close(self) -> None:
        """End what runs and release the model's memory; closing twice is closing once.

        Raises PaddockError while another thread generates.
        """
        if self._closed:
            return
        if self._turn_thread not in (None, threading.get_ident()):
            raise PaddockError("the LLM is generating in another thread", fix="let it finish before closing")
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        """Return the LLM, which the end of the `with` block closes."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the LLM."""
        self.close()


def _given(prompt: Prompt) -> Prompt:
    return prompt


def _one_each(given: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    many = [given] * count if isinstance(given, SamplingParams) else list(given)
    if len(many) != count:
        raise RequestError(f"{count} prompts and {len(many)} sampling parameters", fix="give one for all, or one a prompt")
    for each in many:
        if not isinstance(each, SamplingParams):
            raise RequestError(f"sampling_params is {each!r:.200}", fix="give SamplingParams(...)")
    return many
