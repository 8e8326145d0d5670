"""Accuracy on a multiple-choice task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attrs import frozen

from paddock.errors import OptionError, RequestError
from paddock.evaluation.scoring import Pair, continuation_logprobs
from paddock.evaluation.tasks import Document, Question, Task, ask, find_task
from paddock.evaluation.texts import Progress, check_limit
from paddock.llm import LLM

DEFINITIONS = {
    "accuracy": ("accuracy", "", "share of documents whose right continuation has the highest log-likelihood"),
    "accuracy_error": ("standard error", "", "of the accuracy: sqrt(p (1 - p) / (documents - 1))"),
    "accuracy_normalised": ("accuracy, normalised", "", "the same, each log-likelihood divided by its continuation's characters"),
    "accuracy_normalised_error": ("standard error", "", "of the normalised accuracy"),
    "documents": ("documents", "", "questions that were asked"),
    "shots": ("examples", "", "answered questions before each"),
    "truncated": ("truncated", "prompts", "that lost the beginning of their context to max_model_len"),
}


@frozen(kw_only=True)
class ChoiceResult:
    """What a model chose. `log_likelihoods` has, for each document, those of its continuations in nats; `answers` the right ones.

    `normalised` has each log-likelihood divided by the characters of its continuation, the space before it not counted.
    """

    task: str
    shots: int
    answers: tuple[int, ...]
    log_likelihoods: tuple[tuple[float, ...], ...]
    normalised: tuple[tuple[float, ...], ...]
    truncated: int

    @property
    def documents(self) -> int:
        """Return how many documents were asked."""
        return len(self.answers)

    @property
    def accuracy(self) -> float:
        """Return the share of documents whose right continuation is the likeliest; among equals the first counts."""
        return _share_right(self.log_likelihoods, self.answers)

    @property
    def accuracy_error(self) -> float | None:
        """Return the standard error of the accuracy, None for a single document."""
        return _standard_error(self.accuracy, self.documents)

    @property
    def accuracy_normalised(self) -> float:
        """Return the accuracy by log-likelihood a character."""
        return _share_right(self.normalised, self.answers)

    @property
    def accuracy_normalised_error(self) -> float | None:
        """Return the standard error of the normalised accuracy, None for a single document."""
        return _standard_error(self.accuracy_normalised, self.documents)


def _share_right(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    right = sum(max(range(len(row)), key=row.__getitem__) == answer for row, answer in zip(scores, answers, strict=True))
    return right / len(answers)


def _standard_error(share: float, count: int) -> float | None:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def choices(
    llm: LLM,
    task: Task | str,
    documents: Sequence[Document],
    *,
    shots: int = 0,
    examples: Sequence[Document] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ChoiceResult:
    """Return which continuation of each document the model finds likeliest, all of them through the engine at once.

    `shots` answered questions go before each, the first ones of `examples` and of the document's own group (MMLU's subject);
    without `examples` they are other documents of the set itself. `limit` asks the first so many documents; `progress` is called
    with the continuations scored and those in all. A prompt begins with bos where the tokenizer puts one, and one longer than
    max_model_len allows loses the beginning of its context. Raises OptionError for an unknown task or a malformed document,
    RequestError for what cannot be scored.
    """
    return score(llm, prompts_of(task, documents, shots=shots, examples=examples, limit=limit), progress=progress)


@frozen(kw_only=True)
class Prompts:
    """What is asked of a model: the questions, and for each of their continuations (context, continuation, where it is from)."""

    task: Task
    shots: int
    questions: tuple[Question, ...]
    pairs: tuple[tuple[str, str, str], ...]


def prompts_of(
    task: Task | str,
    documents: Sequence[Document],
    *,
    shots: int = 0,
    examples: Sequence[Document] | None = None,
    limit: int | None = None,
) -> Prompts:
    """Return what `choices` asks; raise what it raises of a task, documents and shots, before there is a model."""
    found = find_task(task) if isinstance(task, str) else task
    check_limit(limit)
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise RequestError(f"shots is {shots!r}", fix="give a whole number, 0 or more")
    asked = documents if limit is None else documents[:limit]
    if not asked:
        raise OptionError(f"no documents of {found.name}", fix=f"fetch them: paddock eval fetch {found.name}")
    questions = [ask(found, document, f"document {i} of {found.name}") for i, document in enumerate(asked)]
    before = _Examples(found, documents if examples is None else examples, shots, same_set=examples is None)
    pairs = list[tuple[str, str, str]]()
    for i, (document, question) in enumerate(zip(asked, questions, strict=True)):
        first, where = before.of(document, i), f"document {i} of {found.name}"
        whole = {context: first + context for context in question.contexts}  # a text for all continuations that share it
        pairs += [(whole[context], each, where) for context, each in zip(question.contexts, question.continuations, strict=True)]
    return Prompts(task=found, shots=shots, questions=tuple(questions), pairs=tuple(pairs))


def score(llm: LLM, prompts: Prompts, *, progress: Progress | None = None) -> ChoiceResult:
    """Return which continuation the model finds likeliest of each question; `choices` says what is raised."""
    encoder = _Encoder(llm)
    pairs = [encoder.pair(*each) for each in prompts.pairs]
    scores = continuation_logprobs(llm, pairs, progress=progress)
    return _result(prompts.task, prompts.shots, prompts.questions, scores, truncated=sum(pair.cut for pair in pairs))


def _result(task: Task, shots: int, questions: Sequence[Question], scores: Sequence[float], *, truncated: int) -> ChoiceResult:
    each = iter(scores)
    plain = tuple(tuple(next(each) for _ in question.continuations) for question in questions)
    normalised = tuple(
        tuple(score / len(text) for score, text in zip(row, question.continuations, strict=True))
        for row, question in zip(plain, questions, strict=True)
    )
    return ChoiceResult(
        task=task.name,
        shots=shots,
        answers=tuple(question.answer for question in questions),
        log_likelihoods=plain,
        normalised=normalised,
        truncated=truncated,
    )


class _Examples:
    """The answered questions that go before a document: its task's description, then the first ones of its group."""

    def __init__(self, task: Task, documents: Sequence[Document], shots: int, *, same_set: bool) -> None:
        self._task, self._shots, self._same_set = task, shots, same_set
        self._groups: dict[str, list[tuple[int, Document]]] = {}
        for i, document in enumerate(documents if shots else ()):
            ask(task, document, f"example {i} of {task.name}")
            self._groups.setdefault(task.group(document), []).append((i, document))

    def of(self, document: Document, index: int) -> str:
        """Return what goes before document `index` of the set; raise OptionError where there are too few examples."""
        others = (each for i, each in self._groups.get(self._task.group(document), []) if not (self._same_set and i == index))
        chosen = [each for each, _ in zip(others, range(self._shots), strict=False)]
        if len(chosen) < self._shots:
            group = self._task.group(document)
            of_group = f" of {group}" if group else ""
            raise OptionError(
                f"{self._shots} examples were asked for, {self._task.name} has {len(chosen)}{of_group}", fix="ask for fewer"
            )
        return self._task.description(document) + "".join(self._answered(each) for each in chosen)

    def _answered(self, document: Document) -> str:
        question = self._task.ask(document)
        return f"{question.contexts[question.answer]} {question.continuations[question.answer]}\n\n"


class _Encoder:
    """Makes pairs in token ids; a context that several continuations follow is encoded by itself, and kept, once."""

    def __init__(self, llm: LLM) -> None:
        """Raise RequestError for an engine without a tokenizer."""
        if llm.tokenizer is None:
            raise RequestError("a task needs a tokenizer, and none is loaded", fix="load a model folder with tokenizer.json")
        self._encode = llm.tokenizer.encode
        self._most = llm.max_model_len - 1
        self._context, self._length = "", len(self._encode(""))
        self._last: tuple[int, ...] = ()

    def pair(self, context: str, continuation: str, where: str) -> Pair:
        """Return a pair, encoded together: the continuation has the ids that the context alone does not account for.

        Spaces at the context's end belong to the continuation, as in lm-evaluation-harness. Raises RequestError naming `where`.
        """
        whole = self._encode(f"{context} {continuation}")
        if context != self._context:
            self._context, self._length = context, len(self._encode(context.rstrip()))
        continued = len(whole) - self._length
        if not 0 < continued < len(whole):
            raise RequestError(
                f"{where}: {continuation!r:.60} has no token of its own after {context[-40:]!r}", fix="leave the document out"
            )
        if continued >= self._most:
            raise RequestError(
                f"{where}: a continuation has {continued} tokens, max_model_len leaves {self._most}", fix="raise max_model_len"
            )
        kept = whole[-self._most :]
        if self._last != tuple(kept[:-continued]):
            self._last = tuple(kept[:-continued])
        return Pair(self._last, tuple(kept[-continued:]), cut=len(whole) > self._most)
