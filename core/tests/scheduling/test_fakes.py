from __future__ import annotations

from collections.abc import Callable

import pytest
from core.tests.scheduling.driver import request

from paddock.scheduling.step import Admission, PrefillChunk, Step
from paddock.testing.fakes import FakeModel, FakeRunner


def runner() -> FakeRunner:
    """Return a runner with two slots and four pages of two tokens."""
    return FakeRunner(model=FakeModel(), num_slots=2, num_pages=4, page_size=2, max_num_batched_tokens=8)


def admission(slot: int, token_ids: list[int]) -> Admission:
    """Return the admission of a prompt."""
    params = request("r", 1).params
    return Admission(slot, f"r{slot}#0", params, token_ids, len(token_ids), frozenset(), (), None)


def prefill(number: int = 0) -> Step:
    """Return a right first step: a prompt of three tokens in slot 0, pages 2 and 0."""
    chunk = PrefillChunk(0, 0, [5, 6, 7], samples=True)
    return Step(number, prefills=[chunk], admissions=[admission(0, [5, 6, 7])], pages=[(0, 0, [2, 0])])


def test_the_fake_runner_gives_what_the_fake_model_defines() -> None:
    """Prefill and decodes together give the model's continuation of the whole history."""
    fake = runner()
    tokens = fake.launch(prefill()).result().token_ids
    tokens += fake.launch(Step(1, [0], [3])).result().token_ids
    tokens += fake.launch(Step(2, [0], [4], pages=[(0, 2, [1])])).result().token_ids
    assert tokens == FakeModel().generate([5, 6, 7], 3)


def test_the_fake_models_tokens_depend_on_the_whole_history_and_the_seed() -> None:
    """Histories that differ at the start, and seeds, give different continuations."""
    model = FakeModel(vocab_size=1000)
    assert model.generate([1, 2, 3], 4) != model.generate([9, 2, 3], 4)
    assert model.generate([1, 2, 3], 4, seed=1) != model.generate([1, 2, 3], 4, seed=2)


def wrong_token(step: Step) -> None:
    """Feed a token that is not the sequence's."""
    step.prefills[0].token_ids[1] = 9


def wrong_start(step: Step) -> None:
    """Leave out the first tokens though nothing is cached."""
    step.prefills[0].start, step.prefills[0].token_ids = 2, [7]


def too_many(step: Step) -> None:
    """Exceed the token budget."""
    step.admissions[0].token_ids = step.prefills[0].token_ids = list(range(9))


def no_page(step: Step) -> None:
    """Grant a page less than is written."""
    step.pages = [(0, 0, [2])]


def page_twice(step: Step) -> None:
    """Grant one page twice."""
    step.pages = [(0, 0, [2, 2])]


def unknown_page(step: Step) -> None:
    """Grant a page that does not exist."""
    step.pages = [(0, 0, [2, 4])]


def page_of_another(step: Step) -> None:
    """Run a second sequence in the same pages."""
    step.admissions.append(admission(1, [8, 9]))
    step.pages.append((1, 0, [2]))
    step.prefills.append(PrefillChunk(1, 0, [8, 9], samples=True))


def no_sample(step: Step) -> None:
    """Say that the last chunk does not sample."""
    step.prefills[0].samples = False


def slot_twice(step: Step) -> None:
    """Run a slot twice in one step."""
    step.decode_slots, step.decode_positions = [0], [2]


def wrong_number(step: Step) -> None:
    """Skip a step."""
    step.number = 1


FAULTS = [
    wrong_token, wrong_start, too_many, no_page, page_twice, unknown_page, page_of_another, no_sample, slot_twice, wrong_number,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fake_runner_refuses_what_no_device_could_do_rightly(fault: Callable[[Step], None]) -> None:
    """Each fault in an otherwise right step fails in that step."""
    step = prefill()
    fault(step)
    with pytest.raises((AssertionError, IndexError)):
        runner().launch(step)


@pytest.mark.parametrize("position", [2, 4])
def test_the_fake_runner_refuses_a_decode_at_the_wrong_position(position: int) -> None:
    """A decode feeds the last token of the history and no other."""
    fake = runner()
    fake.launch(prefill())
    with pytest.raises(AssertionError, match="is fed"):
        fake.launch(Step(1, [0], [position], pages=[(0, 2, [1])]))
