"""For tests of everything that speaks text: tiny tokenizers, and an engine that answers from a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define, evolve, field

from paddock.errors import QueueFullError
from paddock.request import Logprob, Request
from paddock.scheduling.step import SequenceUpdate
from paddock.text.tokenizer import Tokenizer, make_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_TEXT = ("the quick brown fox jumps over the lazy dog", "a paddock keeps horses, a runtime keeps models", "früh übt sich 日本 🐎")


def byte_level_tokenizer(*, vocab_size: int = 300) -> Tokenizer:
    """Return a byte-level BPE tokenizer (as GPT-2, Llama 3 and Falcon have): ids 0 to 2 are bos, eos and pad."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_TEXT, trainer)
    return make_tokenizer(core, SPECIAL)


def byte_fallback_tokenizer() -> Tokenizer:
    """Return a SentencePiece-style tokenizer (as Llama 2 has): spaces as U+2581, unknown characters as byte tokens, bos first."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, normalizers, processors

    words = ["▁", "▁the", "▁fox", "e", "o", "x", "t", "h", "f", "th", "the", "fo", "fox", "▁t", "▁f"]
    vocab = {token: i for i, token in enumerate([*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    merges = [("t", "h"), ("th", "e"), ("f", "o"), ("fo", "x"), ("▁", "the"), ("▁", "fox"), ("▁", "t"), ("▁", "f")]
    core = Core(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=None))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(list(SPECIAL.values()))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return make_tokenizer(core, SPECIAL)


@define(eq=False)
class ScriptedEngine:
    """Answers every request with the tokens `reply` gives for it, one a step, until they or max_tokens or a stop id end it.

    At most `room` sequences run; one whose `reply` raises ends with an error. Of n continuations, each is asked for with the
    seed it has as a sequence.
    """

    reply: Callable[[Request], Sequence[int]]
    room: int = 1000
    running: dict[tuple[str, int], tuple[Request, list[int]]] = field(factory=dict)
    aborted: list[tuple[str, int | None]] = field(factory=list)
    closed: bool = False

    def add(self, request: Request) -> None:
        """Queue a request."""
        if len(self.running) + request.params.n > self.room:
            raise QueueFullError("the queue is full", fix="try again later")
        for index in range(request.params.n):
            seed = None if request.params.seed is None else request.params.seed + index
            alone = evolve(request, params=evolve(request.params, n=1, seed=seed))
            self.running[request.request_id, index] = (alone, [])

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its sequences."""
        self.aborted.append((request_id, index))
        for key in [key for key in self.running if key[0] == request_id and index in (None, key[1])]:
            del self.running[key]

    @property
    def has_work(self) -> bool:
        """Return whether a request runs."""
        return bool(self.running)

    def step(self) -> list[SequenceUpdate]:
        """Return the next token of every running request."""
        return [self._next(index, request, given) for (_, index), (request, given) in list(self.running.items())]

    def _next(self, index: int, request: Request, given: list[int]) -> SequenceUpdate:
        update = SequenceUpdate(request.request_id, index, [])
        try:
            script = self.reply(request)
        except ValueError as error:
            update.finish_reason, update.error = "error", str(error)
        else:
            token = script[len(given)]
            given.append(token)
            update.token_ids = [token]
            if request.params.logprobs is not None:
                update.logprobs = {token: Logprob(-0.5, 1)}
            if token in request.stop_ids:
                update.finish_reason, update.stop_reason = "stop", token
            elif len(given) in (request.params.max_tokens, len(script)):
                update.finish_reason = "length"
        if update.finish_reason is not None:
            del self.running[request.request_id, index]
        return update

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True
