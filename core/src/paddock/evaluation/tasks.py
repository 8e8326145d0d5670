"""The multiple-choice tasks: from a document to what a model is asked, each by the convention of lm-evaluation-harness.

Prompts, the space between context and continuation, the joining of examples by an empty line, and what is normalised are those of
the task files of EleutherAI's lm-evaluation-harness (`lm_eval/tasks/NAME`); OLMo's evaluation asks ARC, HellaSwag, PIQA,
WinoGrande and BoolQ in the same words. `paddock.evaluation.documents` says where documents come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

from paddock.errors import OptionError, did_you_mean

Document = Mapping[str, Any]
_LETTERS = ("A", "B", "C", "D")


@frozen(kw_only=True)
class Question:
    """One document as it is asked: a context and a continuation for each choice, and which of them is right.

    `continuations` are without the space that goes before them, and what length normalisation counts.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int


@frozen(kw_only=True)
class Task:
    """A task: how a document is asked, what stands before everything, and which documents may be examples for which."""

    name: str
    summary: str
    ask: Callable[[Document], Question]
    group: Callable[[Document], str] = lambda document: ""
    description: Callable[[Document], str] = lambda document: ""


def _same(context: str, continuations: tuple[str, ...], answer: int) -> Question:
    """Return a question whose context is the same for every choice."""
    return Question(contexts=(context,) * len(continuations), continuations=continuations, answer=answer)


def _ask_arc(document: Document) -> Question:
    choices = document["choices"]
    right = list(choices["label"]).index(document["answerKey"])
    return _same(f"Question: {document['question']}\nAnswer:", tuple(choices["text"]), right)


def _without_brackets(text: str) -> str:
    """Return a text of WikiHow without its marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _ask_hellaswag(document: Document) -> Question:
    context = f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}"
    endings = tuple(_without_brackets(ending) for ending in document["endings"])
    return _same(_without_brackets(context), endings, int(document["label"]))


def _ask_piqa(document: Document) -> Question:
    return _same(f"Question: {document['goal']}\nAnswer:", (document["sol1"], document["sol2"]), int(document["label"]))


def _ask_winogrande(document: Document) -> Question:
    """Return the sentence's end as the continuation of each option: which of them makes it likelier."""
    before, _, after = document["sentence"].partition("_")
    options = (document["option1"], document["option2"])
    contexts = tuple(before + option for option in options)
    return Question(contexts=contexts, continuations=(after.strip(),) * 2, answer=int(document["answer"]) - 1)


def _ask_boolq(document: Document) -> Question:
    context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
    return _same(context, ("no", "yes"), int(document["answer"]))


def _ask_mmlu(document: Document) -> Question:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(_LETTERS, document["choices"], strict=True))
    return _same(f"{document['question'].strip()}{choices}\nAnswer:", _LETTERS, int(document["answer"]))


def _mmlu_subject(document: Document) -> str:
    return str(document["subject"])


def _mmlu_description(document: Document) -> str:
    subject = _mmlu_subject(document).replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


TASKS = {
    task.name: task
    for task in (
        Task(
            name="mmlu",
            summary="57 subjects, four answers by their letters",
            ask=_ask_mmlu,
            group=_mmlu_subject,
            description=_mmlu_description,
        ),
        Task(name="hellaswag", summary="how a scene goes on, four endings", ask=_ask_hellaswag),
        Task(name="arc_easy", summary="easier school science, answers in words", ask=_ask_arc),
        Task(name="arc_challenge", summary="harder school science, answers in words", ask=_ask_arc),
        Task(name="piqa", summary="how to do things, two ways", ask=_ask_piqa),
        Task(name="winogrande", summary="whom a sentence means, two options", ask=_ask_winogrande),
        Task(name="boolq", summary="yes or no, from a passage", ask=_ask_boolq),
    )
}


def find_task(name: str) -> Task:
    """Return the task of a name; raise OptionError with the nearest for an unknown one."""
    if name not in TASKS:
        raise OptionError(f"no task {name!r}", fix=did_you_mean(name, TASKS))
    return TASKS[name]


def ask(task: Task, document: Document, where: str) -> Question:
    """Return the question a document makes; raise OptionError naming `where` it stands when it is not of the task's form."""
    try:
        question = task.ask(document)
        task.description(document), task.group(document)
    except KeyError as error:
        raise OptionError(f"{where} has no {error}", fix=_form_fix(task)) from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise OptionError(f"{where} is no document of {task.name}: {error}", fix=_form_fix(task)) from None
    texts = (*question.contexts, *question.continuations)
    if not all(isinstance(text, str) and text for text in texts) or not 0 <= question.answer < len(question.continuations):
        raise OptionError(f"{where} is no document of {task.name}: {dict(document)!r:.200}", fix=_form_fix(task))
    return question


def _form_fix(task: Task) -> str:
    return f"give documents as `paddock eval fetch {task.name}` writes them"
