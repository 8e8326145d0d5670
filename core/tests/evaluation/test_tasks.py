"""How documents are asked, by the conventions of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import pytest

from paddock.errors import OptionError
from paddock.evaluation.tasks import TASKS, Question, ask, find_task

ARC = {"question": "What boils?", "choices": {"text": ["ice", "water", "fire"], "label": ["1", "2", "3"]}, "answerKey": "2"}
HELLASWAG = {
    "activity_label": "Cleaning sinks",
    "ctx_a": "[header] How to clean [title] Take soap. [step] Wet it.",
    "ctx_b": "then",
    "endings": ["[substeps] Rub it.", " Break  it."],
    "label": "1",
}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "hellaswag": HELLASWAG,
    "piqa": {"goal": "Open a jar", "sol1": "Twist it.", "sol2": "Smash it.", "label": 0},
    "winogrande": {"sentence": "Ann thanked Eva as _ had helped.", "option1": "Ann", "option2": "Eva", "answer": "2"},
    "boolq": {"passage": "Water is wet.", "question": "is water wet", "answer": True},
    "mmlu": {"question": " 1 + 1? ", "subject": "elementary_mathematics", "choices": ["1", "2", "3", "4"], "answer": 1},
}
QUESTIONS = {
    "arc_easy": (("Question: What boils?\nAnswer:",) * 3, ("ice", "water", "fire"), 1),
    "arc_challenge": (("Question: What boils?\nAnswer:",) * 3, ("ice", "water", "fire"), 1),
    "hellaswag": (("Cleaning sinks: How to clean. Take soap. Wet it. Then",) * 2, (" Rub it.", "Break it."), 1),
    "piqa": (("Question: Open a jar\nAnswer:",) * 2, ("Twist it.", "Smash it."), 0),
    "winogrande": (("Ann thanked Eva as Ann", "Ann thanked Eva as Eva"), ("had helped.",) * 2, 1),
    "boolq": (("Water is wet.\nQuestion: is water wet?\nAnswer:",) * 2, ("no", "yes"), 1),
    "mmlu": (("1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",) * 4, ("A", "B", "C", "D"), 1),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_document_is_asked_as_the_harness_asks_it(name: str) -> None:
    """Context, continuations and the right answer, to the character."""
    contexts, continuations, answer = QUESTIONS[name]
    expected = Question(contexts=contexts, continuations=continuations, answer=answer)
    assert ask(TASKS[name], DOCUMENTS[name], "document 0") == expected


def test_only_mmlu_says_what_it_is_about() -> None:
    """Its description names the subject in words; the other tasks have none."""
    said = {name: task.description(DOCUMENTS[name]) for name, task in TASKS.items()}
    about = "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
    assert said == {**dict.fromkeys(TASKS, ""), "mmlu": about}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("wrong", ["missing", "type", "answer"])
def test_a_document_of_another_form_is_named(name: str, wrong: str) -> None:
    """A key that is missing, a value of the wrong type, an answer that is no choice: the error says where, and the way out."""
    document = dict(DOCUMENTS[name])
    answer = next(key for key in ("answerKey", "label", "answer") if key in document)
    if wrong == "missing":
        document.pop(answer)
    else:
        document[answer] = {} if wrong == "type" else 9
    with pytest.raises(OptionError, match="document 7") as caught:
        ask(TASKS[name], document, "document 7")
    assert caught.value.fix == f"give documents as `paddock eval fetch {name}` writes them"


def test_an_unknown_task_is_told_its_nearest() -> None:
    """A misspelt name is an error with the right one."""
    with pytest.raises(OptionError, match="did you mean 'hellaswag'"):
        find_task("hellaswagg")


def test_a_document_of_no_group_is_named() -> None:
    """MMLU's subject is in no question, but it is asked for."""
    document = {key: value for key, value in DOCUMENTS["mmlu"].items() if key != "subject"}
    with pytest.raises(OptionError, match="document 3 has no 'subject'"):
        ask(TASKS["mmlu"], document, "document 3")


def test_an_answer_beyond_all_numbers_is_named() -> None:
    """JSON as Python reads it has infinities."""
    with pytest.raises(OptionError, match="document 3 is no document of piqa"):
        ask(TASKS["piqa"], DOCUMENTS["piqa"] | {"label": float("inf")}, "document 3")
