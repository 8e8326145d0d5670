"""The engine that speaks text, around one that follows a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from paddock.errors import PaddockError, QueueFullError, RequestError
from paddock.request import Request, RequestOutput, SamplingParams
from paddock.testing.text import ScriptedEngine
from paddock.text.chat import ChatTemplates
from paddock.text.files import TextFiles
from paddock.text.frontend import TextEngine
from paddock.text.tokenizer import Tokenizer

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}>{% endif %}"
Make = Callable[..., TextEngine]


@pytest.fixture
def make(byte_level: Tokenizer) -> Iterator[Make]:
    """Return a maker of text engines whose inner engine answers with one text, or with what a function of the request gives."""
    made = []

    def build(answer: str | Callable[[Request], list[int]] = "the quick brown fox", **options: Any) -> TextEngine:
        ids = [*byte_level.encode(answer), 1] if isinstance(answer, str) else []
        engine = ScriptedEngine(answer if callable(answer) else lambda _: ids, room=options.pop("room", 1000))
        text = TextFiles(tokenizer=byte_level, templates=ChatTemplates({"default": CHAT}), eos_ids=frozenset({1}))
        made.append(TextEngine(engine, options.pop("text", text), vocab_size=300, max_model_len=options.pop("max_model_len", 64)))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def _inner(engine: TextEngine) -> ScriptedEngine:
    assert isinstance(engine._engine, ScriptedEngine)
    return engine._engine


def _params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 50, **options})


def _run(engine: TextEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_a_prompt_gives_its_text(make: Make, byte_level: Tokenizer) -> None:
    """The final output holds prompt, ids, text without the end-of-text token, reason and ordered times."""
    engine = make()
    engine.add("a fox", _params(), request_id="one", final_only=True)
    (output,) = _run(engine)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("one", "a fox", byte_level.encode("a fox"))
    assert (output.text, output.finish_reason, output.outputs[0].stop_reason) == ("the quick brown fox", "stop", 1)
    assert output.token_ids == [*byte_level.encode("the quick brown fox"), 1]
    times = output.timings
    assert times is not None
    assert times.first_token is not None
    assert times.finished is not None
    assert times.arrived <= times.first_token <= times.finished == output.outputs[0].token_times[-1]


def test_a_stream_grows_and_ends_as_the_final_output(make: Make) -> None:
    """Each step's output extends the one before; the last equals what final_only gives."""
    engine = make("früh übt sich 🐎")
    engine.add("x", _params())
    outputs = _run(engine)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for before, after in pairwise(outputs):
        assert after.text.startswith(before.text)
        assert len(after.token_ids) == len(before.token_ids) + 1
    assert outputs[-1].text == "früh übt sich 🐎"
    assert outputs[-1].prompt_token_ids is outputs[0].prompt_token_ids  # not copied with every token


@pytest.mark.parametrize("final_only", [True, False])
@pytest.mark.parametrize(("include", "text"), [(False, "the quick "), (True, "the quick bro")])
def test_a_stop_string_ends_a_request_and_frees_the_engine(make: Make, include: bool, text: str, final_only: bool) -> None:
    """The text is cut at the stop string, the token ids are kept as generated, and the engine drops the request."""
    engine = make()
    engine.add("x", _params(stop=["zzz", "bro"], include_stop_str_in_output=include), request_id="r", final_only=final_only)
    outputs = _run(engine)
    assert (outputs[-1].text, outputs[-1].finish_reason, outputs[-1].outputs[0].stop_reason) == (text, "stop", "bro")
    assert all(text.startswith(output.text) for output in outputs)
    assert engine.tokenizer is not None
    assert text.strip() in engine.tokenizer.decode(outputs[-1].token_ids)
    assert _inner(engine).aborted == [("r", 0)]
    assert not _inner(engine).has_work


def test_a_stop_string_waits_for_min_tokens(make: Make) -> None:
    """A stop string completed before min_tokens tokens is plain text."""
    engine = make("o-o-o-o-o")
    engine.add("x", _params(stop=["o"], min_tokens=4), final_only=True)
    (output,) = _run(engine)
    assert output.text == "o-o-"
    assert len(output.token_ids) == 5


def test_held_back_text_comes_when_the_request_ends(make: Make) -> None:
    """Text that began like a stop string belongs to the answer when nothing follows."""
    engine = make()
    engine.add("x", _params(stop=["fox!"]))
    assert _run(engine)[-1].text == "the quick brown fox"


def test_stop_token_text_is_shown_only_on_request(make: Make, byte_level: Tokenizer) -> None:
    """A stop token that has text is cut off like a stop string, unless that is included."""
    dog = byte_level.encode(" dog")[-1]
    engine = make(lambda _: [90, dog])
    engine.add("x", _params(stop_token_ids=[dog]), final_only=True)
    engine.add("x", _params(stop_token_ids=[dog], include_stop_str_in_output=True), final_only=True)
    plain, included = _run(engine)
    assert plain.text + byte_level.decode([dog]) == included.text
    assert plain.token_ids == included.token_ids == [90, dog]


def test_n_continuations_come_as_one_output(make: Make, byte_level: Tokenizer) -> None:
    """Continuations end on their own, one at its stop string, with seeds of their own, and the request ends with the last."""
    answers = {10: "a fox", 11: "the quick brown fox jumps", 12: "the lazy dog jumps"}
    seen: dict[int, Request] = {}

    def reply(request: Request) -> list[int]:
        assert request.params.seed is not None
        seen[request.params.seed] = request
        return byte_level.encode(answers[request.params.seed])

    engine = make(reply)
    engine.add("x", _params(n=3, seed=10, stop=["lazy"]))
    outputs = _run(engine)
    assert [part.text for part in outputs[-1].outputs] == ["a fox", "the quick brown fox jumps", "the "]
    assert [part.finish_reason for part in outputs[-1].outputs] == ["length", "length", "stop"]
    assert [output.finished for output in outputs].count(True) == 1
    assert sorted(seen) == [10, 11, 12]


def test_logprobs_carry_their_tokens_text(make: Make) -> None:
    """Each token's entry names it in text, and the cumulative log-probability is their sum."""
    engine = make("ab")
    engine.add("x", _params(logprobs=1, max_tokens=2), final_only=True)
    (output,) = _run(engine)
    assert output.outputs[0].logprobs is not None
    assert [entry[token].decoded_token for entry, token in zip(output.outputs[0].logprobs, output.token_ids, strict=True)] == [
        "a",
        "b",
    ]
    assert output.outputs[0].cumulative_logprob == -1.0


def test_an_error_ends_one_request_alone(make: Make, byte_level: Tokenizer) -> None:
    """A request the engine gives up on ends with its error; its neighbour goes on."""

    def reply(request: Request) -> list[int]:
        if request.request_id == "bad":
            raise ValueError("not finite")
        return byte_level.encode("fine")

    engine = make(reply)
    engine.add("x", _params(), request_id="bad", final_only=True)
    engine.add("x", _params(), request_id="good", final_only=True)
    outputs = {output.request_id: output for output in _run(engine)}
    assert (outputs["bad"].finish_reason, outputs["bad"].outputs[0].error) == ("error", "not finite")
    assert outputs["good"].text == "fine"


def test_an_abort_returns_what_there_was(make: Make) -> None:
    """An aborted request gives its text so far and is gone; aborting it again gives nothing."""
    engine = make()
    name = engine.add("x", _params(n=2))
    engine.step()
    output = engine.abort(name)
    assert output is not None
    assert [part.finish_reason for part in output.outputs] == ["abort", "abort"]
    assert output.text == "the"
    assert output.finished
    assert engine.abort(name) is None
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1, 300], {}, "token id 300 at index 1, outside the vocabulary of 300"),
        ([-1], {}, "token id -1 at index 0"),
        ([True], {}, "the prompt is"),
        ([1.5], {}, "the prompt is"),
        (None, {}, "the prompt is None"),
        ({"text": "x"}, {}, "the prompt is"),
        ({}, {}, "neither prompt nor prompt_token_ids"),
        ([5] * 64, {}, r"64 tokens, which leaves no room in max_model_len 64\n  fix: shorten the prompt to at most 63"),
        ("x", {"stop_token_ids": [999]}, "stop_token_ids holds token id 999"),
        ("x", {"logit_bias": {999: 1.0}}, "logit_bias holds token id 999"),
        ("x", {"logprobs": 301}, "logprobs is 301, the model has 300 tokens"),
    ],
)
def test_a_bad_request_is_refused_with_its_value(make: Make, prompt: Any, options: dict[str, Any], complaint: str) -> None:
    """What cannot run raises at once, says why, and queues nothing."""
    engine = make()
    with pytest.raises(RequestError, match=complaint):
        engine.add(prompt, _params(**options))
    assert not engine.has_work


def test_prompts_may_come_as_text_ids_or_both(make: Make, byte_level: Tokenizer) -> None:
    """A mapping with a text, with ids, or with both (the ids count) is a prompt."""
    engine = make()
    ids = byte_level.encode("fox")
    assert engine.encode({"prompt": "fox"}).token_ids == tuple(ids) == engine.encode({"prompt_token_ids": ids}).token_ids
    both = engine.encode({"prompt": "shown", "prompt_token_ids": ids})
    assert (both.text, both.token_ids) == ("shown", tuple(ids))


def test_a_full_queue_takes_all_continuations_or_none(make: Make) -> None:
    """When n continuations do not all fit, none is queued."""
    engine = make(room=2)
    with pytest.raises(QueueFullError):
        engine.add("x", _params(n=3))
    assert not _inner(engine).has_work
    assert not engine.has_work


def test_a_request_id_is_unique(make: Make) -> None:
    """An id in use is refused."""
    engine = make()
    engine.add("x", _params(), request_id="a")
    with pytest.raises(RequestError, match="'a' is taken"):
        engine.add("x", _params(), request_id="a")


def test_bad_words_reach_the_engine_with_and_without_a_space(make: Make, byte_level: Tokenizer) -> None:
    """A bad word is banned at the start of a text and after a space."""
    engine = make()
    engine.add("x", _params(bad_words=["fox"]))
    ((request, _),) = _inner(engine).running.values()
    assert request.bad_words_ids == (tuple(byte_level.encode("fox")), tuple(byte_level.encode(" fox")))


def test_without_a_tokenizer_only_ids_go_in_and_out(make: Make) -> None:
    """Token ids run; text, stop strings, bad words and chats say that no tokenizer is loaded."""
    engine = make(lambda _: [7, 8], text=TextFiles())
    engine.add([5, 6], _params(logprobs=1), final_only=True)
    (output,) = _run(engine)
    assert (output.text, output.token_ids, output.prompt) == ("", [7, 8], None)
    for prompt, options in (("x", {}), ([5], {"stop": "x"}), ([5], {"bad_words": ["x"]})):
        with pytest.raises(RequestError, match="needs a tokenizer"):
            engine.add(prompt, _params(**options))


def test_a_chat_becomes_a_prompt_without_a_second_bos(make: Make) -> None:
    """The template writes the special tokens; encoding adds none. A template may be given, by name or in full."""
    engine = make()
    messages = [{"role": "user", "content": "fox"}]
    prompt = engine.chat_prompt(messages)
    assert prompt["prompt"] == "<s>fox|>"
    assert prompt["prompt_token_ids"][:1] == [0]
    assert prompt["prompt_token_ids"].count(0) == 1
    assert engine.chat_prompt(messages, add_generation_prompt=False)["prompt"] == "<s>fox|"
    assert engine.chat_prompt(messages, chat_template="{{ mood }}", variables={"mood": "glad"})["prompt"] == "glad"
    with pytest.raises(RequestError, match="no chat template 'defalt'"):
        engine.chat_prompt(messages, chat_template="defalt")


def test_closing_ends_everything(make: Make) -> None:
    """After close no request runs, the engine is closed, and using it is an error."""
    engine = make()
    engine.add("x", _params())
    engine.close()
    engine.close()
    assert not engine.has_work
    assert _inner(engine).closed
    with pytest.raises(PaddockError, match="closed"):
        engine.step()


def test_a_step_that_raises_ends_every_request(make: Make) -> None:
    """The error of a whole step reaches the caller, and the engine is empty and usable afterwards."""
    broken = True

    def reply(_: Request) -> list[int]:
        if broken:
            raise RuntimeError("device lost")
        return [5]

    engine = make(reply)
    engine.add("x", _params())
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    assert not engine.has_work
    broken = False
    _inner(engine).running.clear()
    engine.add("x", _params())
    assert _run(engine)[-1].finished
