"""The engine that speaks text: prompts in, outputs out, around an engine that knows token ids alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from paddock.errors import PaddockError, RequestError
from paddock.execution.memory import MemoryUse
from paddock.request import Request, RequestOutput, SamplingParams
from paddock.scheduling.step import SequenceUpdate
from paddock.text.chat import ChatRenderer, ChatTemplates, Message
from paddock.text.files import TextFiles
from paddock.text.outputs import LiveRequest
from paddock.text.prompts import EncodedPrompt, Prompt, PromptReader
from paddock.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from paddock.execution.prompt_logprobs import PromptWatcher


class TokenEngine(Protocol):
    """What runs requests in token ids: `execution.engine.Engine`, or a fake."""

    def add(self, request: Request) -> None:
        """Queue a request, or raise RequestError."""

    def abort(self, request_id: str, index: int | None = None) -> object:
        """End a request, or its continuation `index` alone; no update of it that comes later matters."""

    def step(self) -> list[SequenceUpdate]:
        """Run one step and return what it gave."""

    @property
    def has_work(self) -> bool:
        """Return whether a step would do anything."""

    def close(self) -> None:
        """Release everything."""


class TextEngine:
    """Runs many requests at once, in text. Not thread-safe: one caller adds, steps and aborts.

    `plan` is the resolved Plan it was built from, where there is one; `memory_use()` what it really takes of a GPU's memory;
    `watch_prompts(watcher)` shows a PromptWatcher (None: nobody) the logits of prompts whose logprobs are asked for.
    Times come from `clock`, in monotonic seconds.
    """

    def __init__(
        self,
        engine: TokenEngine,
        text: TextFiles,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_ids: frozenset[int] = frozenset(),
        plan: Any = None,
        chat: ChatRenderer | None = None,
        memory_use: Callable[[], MemoryUse | None] = lambda: None,
        watch_prompts: Callable[[PromptWatcher | None], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._text = text
        self.plan = plan
        self._reader = PromptReader(
            tokenizer=text.tokenizer, vocab_size=vocab_size, max_model_len=max_model_len, eos_ids=eos_ids | text.eos_ids
        )
        self._chat = chat or ChatRenderer()
        self.memory_use = memory_use
        self.watch_prompts = watch_prompts or _unwatched
        self._clock = clock
        self._requests: dict[str, LiveRequest] = {}
        self._numbers = itertools.count()
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None when only token ids go in and out."""
        return self._text.tokenizer

    @property
    def templates(self) -> ChatTemplates:
        """Return the model's chat templates."""
        return self._text.templates

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Return the sampling the model's generation_config.json recommends, by SamplingParams' names."""
        return self._text.sampling

    @property
    def vocab_size(self) -> int:
        """Return how many token ids the model knows."""
        return self._reader.vocab_size

    @property
    def max_model_len(self) -> int:
        """Return how many tokens a prompt and its continuation may have together."""
        return self._reader.max_model_len

    @property
    def has_work(self) -> bool:
        """Return whether a request is unfinished."""
        return bool(self._requests)

    def add(
        self,
        prompt: Prompt | EncodedPrompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        final_only: bool = False,
    ) -> str:
        """Queue a prompt and return its request id; raise RequestError, with nothing queued, when it cannot run.

        With `final_only` `step` returns its output once, at its end; else (a stream) whenever it grows.
        """
        self._need_open()
        request_id = request_id if request_id is not None else f"request-{next(self._numbers)}"
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is taken", fix="choose another, or leave it out")
        encoded = self._reader.encode(prompt)
        request = self._reader.request(request_id, encoded, params, priority=priority)
        live = LiveRequest.of(request, encoded, self.tokenizer, final_only=final_only, arrived=self._clock())
        self._engine.add(request)
        self._requests[request_id] = live
        return request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and return what it had, its finish_reason `abort`; None when there is no such request."""
        live = self._requests.pop(request_id, None)
        if live is None:
            return None
        self._engine.abort(request_id)
        for sequence in live.sequences:
            sequence.end("abort")
        live.finished = self._clock()
        return live.output()

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs of the requests that ended and of the streams that grew.

        A step that raises ends every request.
        """
        self._need_open()
        if not self._requests:
            return []
        try:
            updates = self._engine.step()
        except BaseException:
            self._requests.clear()
            raise
        now = self._clock()
        touched: dict[str, LiveRequest] = {}
        for update in updates:
            live = self._requests.get(update.request_id)
            if live is not None:
                self._take(live, update, now)
                if live.finished is not None or not live.final_only:
                    touched[live.request_id] = live
        return [live.output() for live in touched.values()]

    def _take(self, live: LiveRequest, update: SequenceUpdate, now: float) -> None:
        live.take(update, now)
        if live.sequences[update.index].finish_reason is not None and update.finish_reason is None:
            self._engine.abort(live.request_id, update.index)  # a stop string: the engine does not know yet
        if live.finished is not None:
            del self._requests[live.request_id]

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return messages as a prompt for `add`, its text and its token ids.

        `chat_template` is a template, or the name of one of the model's; `variables` are further names it may use.
        """
        known = {**(self.tokenizer.special if self.tokenizer else {}), **(variables or {})}
        known |= {"add_generation_prompt": add_generation_prompt, "tools": tools}
        text = self._chat.render(self._template(chat_template, tools), messages, known)
        if self.tokenizer is None:
            raise RequestError("a chat needs a tokenizer, and none is loaded", fix="load a model folder with tokenizer.json")
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def _template(self, given: str | None, tools: object) -> str:
        if given is not None and given not in self.templates.by_name and any(mark in given for mark in "{\n"):
            return given
        return self.templates.choose(given, tools=bool(tools))

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Return a prompt in checked token ids, as `add` would take it."""
        return self._reader.encode(prompt)

    def close(self) -> None:
        """End every request and release the engine; closing twice is closing once."""
        if self._closed:
            return
        self._closed = True
        self._requests.clear()
        self._chat.close()
        self._engine.close()

    def _need_open(self) -> None:
        if self._closed:
            raise PaddockError("the engine is closed", fix="make another one")


def _unwatched(watcher: PromptWatcher | None) -> None:
    if watcher is not None:
        raise PaddockError("this engine computes no logits that can be watched", fix="load a model")
