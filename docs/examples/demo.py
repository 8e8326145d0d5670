"""A real model answers several questions at once: `make demo`, or `python docs/examples/demo.py [MODEL] [QUESTION...]`.

All questions run in one batch; the answers grow side by side as their tokens arrive.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from paddock import LLM, SamplingParams

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about a horse in a paddock.",
    "Explain in one sentence what a compiler does.",
)
COLOURS = ("cyan", "green", "magenta", "yellow")


def main(model: str = str(MODEL), *questions: str) -> None:
    """Load the model and stream its answers to all questions at once."""
    console = Console()
    began = time.monotonic()
    with console.status(f"load {model}"):
        llm = LLM(model, max_model_len=1024)
    console.print(f"[bold]{Path(model).name}[/] loaded in {time.monotonic() - began:.1f} s")
    with llm:
        answer(llm, questions or QUESTIONS, console)


def answer(llm: LLM, questions: Sequence[str], console: Console) -> None:
    """Stream the answers into panels on a terminal; elsewhere print them once they are complete."""
    prompts = [llm.chat_prompt([{"role": "user", "content": question}]) for question in questions]
    params = SamplingParams(temperature=0.0, max_tokens=96, repetition_penalty=1.1)
    answers, tokens, began = [""] * len(questions), [0] * len(questions), time.monotonic()
    with Live(console=console, refresh_per_second=12, transient=False) as live:
        for output in llm.stream(prompts, params):
            index = int(output.request_id.rpartition("-")[2])
            answers[index], tokens[index] = output.outputs[0].text, len(output.outputs[0].token_ids)
            speed = sum(tokens) / (time.monotonic() - began)
            live.update(
                Group(*_panels(questions, answers), Text(f"{sum(tokens)} tokens, {speed:.0f} a second, {len(questions)} at once"))
            )


def _panels(questions: Sequence[str], answers: Sequence[str]) -> list[Panel]:
    pairs = zip(questions, answers, strict=True)
    return [
        Panel(Text(text), title=Text(question), title_align="left", border_style=COLOURS[i % len(COLOURS)])
        for i, (question, text) in enumerate(pairs)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
