"""An LLM over an engine that follows a script, and the command line around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from click.testing import CliRunner, Result

from paddock.cli import bench, chat, generate
from paddock.cli.bench import speed
from paddock.cli.session import Session
from paddock.config import Environment
from paddock.llm import LLM
from paddock.request import Request
from paddock.testing.text import ScriptedEngine, byte_level_tokenizer
from paddock.text.chat import ChatTemplates
from paddock.text.files import TextFiles
from paddock.text.frontend import TextEngine

TOKENIZER = byte_level_tokenizer()
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
COMMANDS = {"bench": bench.command, "chat": chat.command, "generate": generate.command}
OPENERS = {"bench": speed, "chat": chat, "generate": generate}  # the modules that open the LLM of a command
Reply = Callable[[Request], Sequence[int]]
Make = Callable[..., LLM]
Run = Callable[..., Result]


def ids(text: str) -> list[int]:
    """Return the token ids of an answer, its end included."""
    return [*TOKENIZER.encode(text), 1]


def echo(request: Request) -> list[int]:
    """Answer with the prompt, backwards."""
    return ids(TOKENIZER.decode(request.prompt_token_ids)[::-1])


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a maker of LLMs: what they reply, how many requests have room, what sampling the model recommends."""
    made = []

    def build(reply: Reply = echo, *, room: int = 100, max_model_len: int = 256, **sampling: float) -> LLM:
        text = TextFiles(
            tokenizer=TOKENIZER, templates=ChatTemplates({"default": CHAT}), eos_ids=frozenset({1}), sampling=sampling
        )
        engine = TextEngine(ScriptedEngine(reply, room), text, vocab_size=300, max_model_len=max_model_len)
        made.append(LLM.from_engine(engine))
        return made[-1]

    yield build
    for llm in made:
        llm.close()


def scripted(llm: LLM) -> ScriptedEngine:
    """Return the innermost engine of an LLM."""
    engine = llm._engine._engine
    assert isinstance(engine, ScriptedEngine)
    return engine


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs a command on an LLM made before: `run(llm, "generate", "model", ..., input=b"...")`."""

    def invoke(llm: LLM, name: str, *arguments: str, input: bytes = b"") -> Result:
        monkeypatch.setattr(OPENERS[name], "open_llm", lambda session, model, options, progress=None: llm)
        session = Session(environment=Environment())
        return CliRunner().invoke(COMMANDS[name], arguments, obj=session, input=input)

    return invoke
