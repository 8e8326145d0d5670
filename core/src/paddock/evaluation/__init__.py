"""How good a model's answers are: perplexity of a text, accuracy on multiple-choice sets, and two engines side by side.

from paddock import LLM
from paddock.evaluation import choices, compare, perplexity, read_documents

with LLM("models/smollm2-135m-instruct") as llm:
    print(perplexity(llm, Path("article.txt").read_text()))
    print(choices(llm, "arc_easy", read_documents("arc_easy").documents, limit=200))
"""

from __future__ import annotations

from paddock.evaluation.comparison import Comparison, compare
from paddock.evaluation.documents import Documents, read_documents
from paddock.evaluation.multiple_choice import ChoiceResult, choices
from paddock.evaluation.prediction import Perplexity, perplexity
from paddock.evaluation.sets import fetch
from paddock.evaluation.tasks import TASKS, Question, Task

__all__ = [
    "TASKS",
    "ChoiceResult",
    "Comparison",
    "Documents",
    "Perplexity",
    "Question",
    "Task",
    "choices",
    "compare",
    "fetch",
    "perplexity",
    "read_documents",
]
