"""`paddock chat`, through a pipe."""

from __future__ import annotations

import signal

import pytest
from click.testing import CliRunner
from core.tests.api.conftest import TOKENIZER, Make, Run, ids

from paddock.cli import chat
from paddock.cli.session import Session
from paddock.config import Environment
from paddock.errors import OptionError
from paddock.request import Request

Capture = pytest.CaptureFixture[str]


def _seen(request: Request) -> str:
    return TOKENIZER.decode(request.prompt_token_ids)


def _quoting(request: Request) -> list[int]:
    """Answer with how many messages the prompt holds."""
    return ids(f"{_seen(request).count(':') - 1} seen")


def test_history_grows_until_reset(make: Make, run: Run) -> None:
    """Each message is answered with all before it in view; /reset starts anew; /quit leaves."""
    result = run(make(_quoting), "chat", "model", input=b"hi\nmore\n/reset\nagain\n/quit\nnever\n")
    assert result.stdout == "1 seen\n3 seen\n1 seen\n"
    assert "starts anew" in result.stderr
    assert result.exit_code == 0


def test_answers_are_remembered_as_they_were(make: Make, run: Run) -> None:
    """The second prompt holds the first answer, and the system message before everything."""
    prompts: list[str] = []

    def reply(request: Request) -> list[int]:
        if _seen(request) not in prompts:
            prompts.append(_seen(request))
        return ids("yes")

    run(make(reply), "chat", "model", "--system", "be kind", input=b"one\ntwo\n")
    assert prompts == ["s:be kind\nu:one\na:", "s:be kind\nu:one\na:yes\nu:two\na:"]


def test_help_and_unknown_commands(make: Make, run: Run) -> None:
    """/help lists the commands, a misspelt one names the nearest, an empty line does nothing."""
    result = run(make(), "chat", "model", input=b"/help\n/rest\n\n")
    assert all(name in result.stdout for name in ("/reset", "/help", "/quit"))
    assert "did you mean '/reset'?" in result.stderr


def test_ctrl_c_ends_the_answer_and_not_the_program(make: Make, run: Run) -> None:
    """An interrupted answer stays in the history as far as it came, and the next message is answered."""
    pressed: list[bool] = []

    def reply(request: Request) -> list[int]:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return _quoting(request)

    result = run(make(reply), "chat", "model", input=b"hi\nmore\n")
    assert result.stdout == " ...\n3 seen\n"
    assert result.exit_code == 0


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_leaves(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """On a terminal a line is asked for until there is one; its end is the end of the chat."""
    typed: list[str | type[BaseException]] = [KeyboardInterrupt, "hi", EOFError]

    def typing(prompt: str) -> str:
        key = typed.pop(0)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typing)
    assert [chat._read_line(terminal=True), chat._read_line(terminal=True)] == ["hi", None]
    assert "Ctrl-D leaves" in capsys.readouterr().err


def test_wrong_sampling_is_said_before_the_model_loads() -> None:
    """A value out of range is wrong usage, and costs no loading."""
    result = CliRunner().invoke(chat.command, ["no/such/model", "--top-p", "0"], obj=Session(environment=Environment()))
    assert isinstance(result.exception, OptionError)
    assert "top_p is 0.0" in result.exception.message


def test_a_full_conversation_forgets_its_oldest_messages_with_a_notice(make: Make, run: Run) -> None:
    """When history no longer fits, the oldest turns go and the user is told; the system message stays."""
    lines = b"".join(b"message number %d\n" % i for i in range(8))
    result = run(make(_quoting, max_model_len=100), "chat", "model", "--system", "x", input=lines)
    counts = [int(line.split()[0]) for line in result.stdout.splitlines()]
    assert counts[:2] == [2, 4]
    assert max(counts) < 12
    assert "oldest 2 messages are forgotten" in result.stderr
    assert result.exit_code == 0


def test_a_message_too_long_is_refused_and_forgotten(make: Make, run: Run) -> None:
    """A message longer than the model takes is an error with both numbers; the conversation goes on; the exit code says it."""
    result = run(make(_quoting, max_model_len=40), "chat", "model", input=b"%b\nhi\n" % (b"zq " * 40))
    assert result.stdout == "1 seen\n"
    assert "no room in max_model_len 40" in result.stderr
    assert result.exit_code == 1


def test_a_cut_answer_is_said_to_be_cut(make: Make, run: Run) -> None:
    """An answer that ends at its length limit says so."""
    result = run(make(_quoting), "chat", "model", "--max-tokens", "2", input=b"hi\n")
    assert "cut at 2 tokens" in result.stderr
