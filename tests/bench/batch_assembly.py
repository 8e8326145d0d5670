"""Time the host part of a decode step outside the scheduler, tensors included: `python tests/bench/batch_assembly.py`."""

from __future__ import annotations

import random
import statistics
import time

import torch

from paddock.execution.batch import lay_out, send
from paddock.execution.sampling_state import DRAWN, FILTERED, LOGPROBS
from paddock.execution.slots import SlotTable
from paddock.scheduling.step import PrefillChunk, Step

PAGE_SIZE, MAX_MODEL_LEN = 16, 8192


def microseconds(num_sequences: int, *, length: int, features: tuple[int, ...], chunk: int = 0) -> float:
    """Return the median time to assemble a step of decodes of that length, with a prefill chunk of `chunk` tokens."""
    slots = SlotTable(num_sequences + 1, MAX_MODEL_LEN, PAGE_SIZE)
    chance = random.Random(0)
    for slot in range(num_sequences + 1):
        slots.admit(slot, prompt_len=10, features=chance.choice(features))
    last_token_S = torch.zeros(num_sequences + 1, dtype=torch.int64)
    order = chance.sample(range(num_sequences), num_sequences)
    times = []
    for number in range(200):
        granted = [(slot, (length + number) // PAGE_SIZE, [slot]) for slot in range(num_sequences // PAGE_SIZE)]
        step = Step(number, list(order), [length + number] * num_sequences, pages=granted)
        if chunk:
            step.prefills.append(PrefillChunk(num_sequences, 0, [1] * chunk, samples=True))
        began = time.perf_counter()
        slots.grant(step.pages)
        send(lay_out(step, slots), slots, last_token_S)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    """Print a table."""
    mixed = (0, DRAWN, FILTERED, DRAWN | LOGPROBS)
    print("| sequences | length | sampling | prefill chunk | microseconds a step |\n| --- | --- | --- | --- | --- |")
    for num_sequences in (1, 16, 64, 512):
        for length, name, features, chunk in (
            (500, "greedy", (0,), 0),
            (500, "mixed", mixed, 0),
            (4000, "greedy", (0,), 0),
            (4000, "mixed", mixed, 0),
            (500, "greedy", (0,), 2048),
        ):
            found = microseconds(num_sequences, length=length, features=features, chunk=chunk)
            print(f"| {num_sequences} | {length} | {name} | {chunk} | {found:.0f} |")


if __name__ == "__main__":
    main()
