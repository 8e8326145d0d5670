"""The Python front door, over an engine that follows a script."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from core.tests.api.conftest import TOKENIZER, Make, echo, ids, scripted

from paddock import LLM, CheckpointError, OptionError, PaddockError, RequestError, RequestOutput, SamplingParams
from paddock.request import Request
from paddock.text.chat import Message
from paddock.text.prompts import Prompt

PARAMS = SamplingParams(max_tokens=50)


def test_answers_come_in_the_order_of_the_prompts(make: Make) -> None:
    """Short answers end first and are returned where their prompts stand; texts, ids and mappings mix."""
    prompts: list[Prompt] = ["a long prompt", "ab", TOKENIZER.encode("xyz"), {"prompt": "q"}]
    outputs = make().generate(prompts, PARAMS)
    assert [output.text for output in outputs] == ["tpmorp gnol a", "ba", "zyx", "q"]
    assert [output.prompt for output in outputs] == ["a long prompt", "ab", None, "q"]
    assert all(output.finished for output in outputs)


@pytest.mark.parametrize("prompt", ["ab", TOKENIZER.encode("ab"), {"prompt_token_ids": TOKENIZER.encode("ab")}])
def test_one_prompt_gives_one_answer(make: Make, prompt: str | list[int] | dict[str, list[int]]) -> None:
    """A text, a run of ids and a mapping are each one prompt."""
    (output,) = make().generate(prompt, PARAMS)
    assert output.text == "ba"


def test_no_prompts_give_no_answers(make: Make) -> None:
    """An empty list is an empty answer."""
    assert make().generate([]) == []


def test_one_bad_prompt_fails_alone(make: Make) -> None:
    """In a list the bad ones give outputs that say why; the others are answered."""
    outputs = make(max_model_len=20).generate(["ab", "", [999], "a" * 50, 7, "cd"], PARAMS)  # type: ignore[arg-type]
    assert [output.finish_reason for output in outputs] == ["stop", "error", "error", "error", "error", "stop"]
    complaints = [output.outputs[0].error or "" for output in outputs]
    assert ["empty" in complaints[1], "999" in complaints[2], "max_model_len 20" in complaints[3]] == [True] * 3
    assert (outputs[2].prompt_token_ids, outputs[3].prompt, outputs[5].text) == ([999], "a" * 50, "dc")


def test_a_bad_prompt_alone_raises(make: Make) -> None:
    """There is nobody to spare: the error reaches the caller, and the LLM stays usable."""
    llm = make()
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate("")
    with pytest.raises(RequestError, match="the prompts are 7"):
        llm.generate(7)  # type: ignore[arg-type]
    assert llm.generate("ab", PARAMS)[0].text == "ba"


def test_parameters_are_one_for_all_or_one_each(make: Make) -> None:
    """A list of parameters goes with the prompts one by one; another count, or another thing, is an error."""
    each = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)]
    outputs = make().generate(["zq", "zq"], each)
    assert [len(output.token_ids) for output in outputs] == [1, 2]
    with pytest.raises(RequestError, match="1 prompts and 2 sampling parameters"):
        make().generate(["x"], each)
    with pytest.raises(RequestError, match=r"sampling_params is \{'n': 1\}"):
        make().generate(["x"], [{"n": 1}])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="1 prompts and 2 priorities"):
        make().generate(["x"], priority=[1, 2])


def test_more_prompts_than_the_queue_holds_wait_their_turn(make: Make) -> None:
    """A full queue is no error for a batch: prompts are queued as others end."""
    outputs = make(room=2).generate([f"{i} prompt" for i in range(9)], PARAMS)
    assert [output.text for output in outputs] == [f"tpmorp {i}" for i in range(9)]


def test_a_prompt_is_made_once_however_long_it_waits(make: Make) -> None:
    """A chat that finds the queue full is not rendered and encoded anew with every step."""
    llm, rendered = make(room=1), []
    chat_prompt = llm._engine.chat_prompt

    def render(messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        rendered.append(messages[0]["content"])
        return chat_prompt(messages, **options)

    llm._engine.chat_prompt = render  # type: ignore[method-assign]
    outputs = llm.chat([[{"role": "user", "content": name}] for name in ("ab", "cd", "ef")], PARAMS)
    assert rendered == ["ab", "cd", "ef"]
    assert [output.text for output in outputs] == [":a\nba:u", ":a\ndc:u", ":a\nfe:u"]


def test_a_prompt_that_never_fits_the_queue_fails(make: Make) -> None:
    """More continuations than the queue holds are an error of that prompt, not a wait without end."""
    outputs = make(room=2).generate(["ab", "cd"], [SamplingParams(n=3), PARAMS])
    assert (outputs[0].finish_reason, outputs[1].text) == ("error", "dc")


def test_a_stream_grows_to_what_generate_gives(make: Make) -> None:
    """Outputs are cumulative; each prompt's last one is its answer, and the id says which prompt it was."""
    llm = make()
    last: dict[str, RequestOutput] = {}
    for output in llm.stream(["früh", "the fox"], PARAMS):
        before = last.get(output.request_id)
        assert before is None or output.text.startswith(before.text)
        last[output.request_id] = output
    assert [output.text for output in last.values()] == ["hürf", "xof eht"]
    assert [name[-2:] for name in last] == ["-0", "-1"]


def test_leaving_a_stream_aborts_it(make: Make) -> None:
    """After a break nothing runs, and the LLM takes the next call."""
    llm = make()
    for _ in llm.stream(["ab cd ef", "gh ij kl"], PARAMS):
        break
    assert not scripted(llm).has_work
    assert llm.generate("ab", PARAMS)[0].text == "ba"


def test_a_chat_is_answered_through_the_template(make: Make) -> None:
    """One conversation or several; a bad one of several fails alone, alone it raises."""
    llm = make()
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, PARAMS)
    assert (output.prompt, output.text) == ("u:hi\na:", ":a\nih:u")
    outputs = llm.chat([conversation, [{"content": "x"}], conversation], PARAMS)
    assert [each.finish_reason for each in outputs] == ["stop", "error", "stop"]
    assert "message 0" in (outputs[1].outputs[0].error or "")
    with pytest.raises(RequestError, match="message 0"):
        llm.chat([{"content": "x"}], PARAMS)
    (output,) = llm.chat(conversation, PARAMS, chat_template="{{ word }}", chat_template_kwargs={"word": "abc"})
    assert output.text == "cba"


def test_the_models_sampling_is_offered(make: Make) -> None:
    """Recommended sampling comes from the model, and is vLLM's defaults where it recommends none."""
    assert make(temperature=0.6, top_p=0.9).get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.9)
    assert make().get_default_sampling_params() == SamplingParams()


def test_the_models_sampling_is_the_default(make: Make) -> None:
    """Without sampling parameters a request samples as the model recommends; given ones are taken as they are."""
    asked: list[SamplingParams] = []

    def reply(request: Request) -> list[int]:
        asked.append(request.params)
        return ids("")

    llm = make(reply, temperature=0.6, top_k=20)
    llm.generate(["ab"])
    llm.chat([{"role": "user", "content": "ab"}])
    llm.generate(["ab"], SamplingParams())
    assert asked == [SamplingParams(temperature=0.6, top_k=20)] * 2 + [SamplingParams()]
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_p is 7(?s:.*)give sampling_params"):
        make(top_p=7.0).generate("ab")


def test_a_closed_llm_says_so(make: Make) -> None:
    """Closing twice is closing once; what comes after is an error, also in a stream begun before."""
    with make() as llm:
        stream = llm.stream("a long prompt", PARAMS)
        next(stream)
    llm.close()
    assert scripted(llm).closed
    for use in (lambda: llm.generate("x"), lambda: llm.chat([]), lambda: llm.stream("x"), lambda: next(stream)):
        with pytest.raises(PaddockError, match="closed"):
            use()


def test_one_caller_at_a_time(make: Make) -> None:
    """Calling an LLM while it generates, from a thread or beside a stream, is a clear error and disturbs nothing."""
    began, go = threading.Event(), threading.Event()

    def reply(request: Request) -> list[int]:
        began.set()
        assert go.wait(10)
        return echo(request)

    llm = make(reply)
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(llm.generate("abc", PARAMS)[0].text))
    thread.start()
    assert began.wait(10)
    with pytest.raises(PaddockError, match="generating already"):
        llm.generate("x", PARAMS)
    with pytest.raises(PaddockError, match="in another thread"):
        llm.close()
    go.set()
    thread.join()
    assert texts == ["cba"]
    stream = llm.stream("abc", PARAMS)
    next(stream)
    with pytest.raises(PaddockError, match="generating already"):
        llm.generate("x", PARAMS)
    assert [output.text for output in stream][-1] == "cba"


def test_ctrl_c_aborts_between_steps_and_leaves_the_llm_usable(make: Make) -> None:
    """An interrupt within a step lets the step end, then aborts every request and raises KeyboardInterrupt."""
    pressing = True
    survived: list[str] = []

    def reply(request: Request) -> Sequence[int]:
        if pressing and request.request_id == "0-0" and scripted(llm).running["0-1", 0][1]:
            signal.raise_signal(signal.SIGINT)
            survived.append("not cut in half")
        return ids("a long answer")

    llm = make(reply)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], PARAMS)
    assert survived == ["not cut in half"]
    assert sorted(request_id for request_id, _ in scripted(llm).aborted) == ["0-0", "0-1"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pressing = False
    assert llm.generate("b", PARAMS)[0].text == "a long answer"


def test_a_second_ctrl_c_cuts_the_step(make: Make) -> None:
    """A step that does not end can still be interrupted."""

    def reply(request: Request) -> Sequence[int]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    llm = make(reply)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], PARAMS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_unknown_option_names_the_nearest() -> None:
    """A misspelt option is found before anything is read."""
    with pytest.raises(OptionError, match=r"unknown option 'max_model_length'\n.*'max_model_len'"):
        LLM("nowhere", max_model_length=5)


def test_progress_is_quiet_unless_there_is_a_terminal(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written when standard error is no terminal; asked for, the bar shows there."""
    llm = make()
    llm.generate(["a", "b"], PARAMS)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], PARAMS, progress=True)
    out, err = capsys.readouterr()
    assert (out, "2/2" in err) == ("", True)
