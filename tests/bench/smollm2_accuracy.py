"""How near SmolLM2's logits come to transformers' in float32: `python -m tests.bench.smollm2_accuracy [--device cuda]`.

Teacher-forced over 32 prompts, each with 32 tokens that transformers continues it with in float32. One row a dtype and way: whole
texts as prefills of one batch, then the last 32 tokens one by one as decodes of one batch. The error is rms(logits - reference) /
rms(reference) over every position of every text; `top1` the share of positions whose largest logit is the reference's.

T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, frozen
from torch import Tensor

from paddock.testing.paging import step
from tests.assets.built import Built, build
from tests.assets.smollm2 import FOLDER

NEW_TOKENS, LENGTH = 32, 512
FORMS = (
    "The capital of {} is",
    "Question: what is {} known for?\nAnswer:",
    "Write a short story about a traveller who comes to {} in winter, and what the people there tell her.",
    "def population_of(country):\n    # {} has\n    return",
)
PLACES = ("France", "Japan", "Peru", "Kenya", "Norway", "India", "Canada", "New Zealand")
PROMPTS = [form.format(place) for form in FORMS for place in PLACES]


@frozen(kw_only=True)
class Row:
    """One way to compute the logits, and how far from the reference they are."""

    library: str
    dtype: str
    way: str
    relative_rms: float
    top1: float


def built(dtype: str, device: str) -> Built:
    """Return Paddock's SmolLM2."""
    return build(FOLDER, dtype=dtype, device=device, max_model_len=LENGTH, kv_cache_memory_bytes=1 << 28)


def prefilled(ours: Built, texts: list[list[int]]) -> list[Tensor]:
    """Return each text's logits [T, V], all texts being prefills of one batch."""
    return step(ours.model, ours.pages(len(texts), length=LENGTH), ours.backend, [(str(i), text) for i, text in enumerate(texts)])


def decoded(ours: Built, texts: list[list[int]]) -> list[Tensor]:
    """Return the logits [NEW_TOKENS, V] of each text's last tokens, fed one by one, all texts side by side."""
    kept = ours.pages(len(texts), length=LENGTH)
    step(ours.model, kept, ours.backend, [(str(i), text[:-NEW_TOKENS]) for i, text in enumerate(texts)])
    rows = [
        step(ours.model, kept, ours.backend, [(str(i), [text[at]]) for i, text in enumerate(texts)])
        for at in range(-NEW_TOKENS, 0)
    ]
    return [torch.cat(each) for each in zip(*rows, strict=True)]


def reference(dtype: str, device: str) -> Any:
    """Return transformers' SmolLM2."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, dtype))
    return model.to(device).eval()


@torch.inference_mode()
def reference_logits(model: Any, texts: list[list[int]]) -> list[Tensor]:
    """Return each text's logits [T, V], each text alone."""
    return [model(torch.tensor([text], device=model.device)).logits[0].float() for text in texts]


@torch.inference_mode()
def continued(model: Any, prompts: list[list[int]], count: int = NEW_TOKENS) -> list[list[int]]:
    """Return each prompt with `count` greedy tokens of transformers, each prompt alone; an end of text ends nothing."""
    texts = []
    for prompt in prompts:
        text, fed, cache = list(prompt), list(prompt), None
        for _ in range(count):
            output = model(torch.tensor([fed], device=model.device), past_key_values=cache, use_cache=True)
            fed, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
            text += fed
        texts.append(text)
    return texts


def prompt_ids() -> list[list[int]]:
    """Return the prompts in token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return [tokenizer(text).input_ids for text in PROMPTS]


def compare(found: Iterable[Tensor], expected: Iterable[Tensor], *, library: str, dtype: str, way: str) -> Row:
    """Return the row of some logits."""
    error = size = hits = count = 0.0
    for found_TV, expected_TV in zip(found, expected, strict=True):
        error += (found_TV.double() - expected_TV.double()).square().sum().item()
        size += expected_TV.double().square().sum().item()
        hits += (found_TV.argmax(-1) == expected_TV.argmax(-1)).sum().item()
        count += len(found_TV)
    return Row(library=library, dtype=dtype, way=way, relative_rms=(error / size) ** 0.5, top1=hits / count)


def table(device: str) -> Iterator[Row]:
    """Yield the rows: transformers' bfloat16, then Paddock's bfloat16 and float32, all against transformers' float32.

    transformers' row for decodes is of the same positions, which it computes as part of the whole text.
    """
    exact = reference("float32", device)
    texts = continued(exact, prompt_ids())
    expected = reference_logits(exact, texts)
    last = [each_TV[-NEW_TOKENS:] for each_TV in expected]
    theirs = reference_logits(reference("bfloat16", device), texts)
    yield compare(theirs, expected, library="transformers", dtype="bfloat16", way="prefill")
    yield compare([each_TV[-NEW_TOKENS:] for each_TV in theirs], last, library="transformers", dtype="bfloat16", way="decode")
    for dtype in ("bfloat16", "float32"):
        ours = built(dtype, device)
        yield compare(prefilled(ours, texts), expected, library="paddock", dtype=dtype, way="prefill")
        yield compare(decoded(ours, texts), last, library="paddock", dtype=dtype, way="decode")


def main() -> None:
    """Print the table as JSON, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [asdict(row) for row in table(options.device)]
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    versions = {package: version(package) for package in ("paddock", "torch", "transformers")}
    text = json.dumps(
        {"device": name, "prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "versions": versions, "rows": rows}, indent=2
    )
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
