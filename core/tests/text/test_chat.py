"""Chat templates: rendered as Hugging Face renders them, and harmless whatever they say."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddock.errors import CheckpointError, RequestError
from paddock.text.chat import ChatLimits, ChatRenderer, ChatTemplates, read_templates
from paddock.text.chat_worker import address_space, confine

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yo"}]
CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    """Return a renderer with tight limits."""
    limits = ChatLimits(
        seconds=0.5, output_chars=100_000, memory_bytes=1 << 28, messages=20, template_chars=200_000, input_chars=300_000
    )
    renderer = ChatRenderer(limits)
    yield renderer
    renderer.close()


def test_a_chat_renders_as_its_template_says(renderer: ChatRenderer) -> None:
    """Messages, the generation prompt and whitespace control come out as in the template."""
    text = renderer.render(CHATML, MESSAGES, {"add_generation_prompt": True})
    assert text == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>"}'),
        ("{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "Yo"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ strftime_now('%Y') | length }}{{ bos_token }}{{ nothing }}", "4<s>"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}", "Hi <b>"),
    ],
)
def test_the_usual_extras_are_there(renderer: ChatRenderer, template: str, text: str) -> None:
    """JSON without HTML escapes, loop controls, generation blocks, namespaces, the date and special tokens work."""
    assert renderer.render(template, MESSAGES, {"bos_token": "<s>"}) == text


def test_text_parts_are_joined(renderer: ChatRenderer) -> None:
    """Content given as a list of text parts reads as one text; any other part is refused."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert renderer.render("{{ messages[0].content }}", [{"role": "user", "content": parts}], {}) == "a\nb"
    with pytest.raises(RequestError, match="message 0 holds a part that is no text"):
        renderer.render("", [{"role": "user", "content": [{"type": "image_url"}]}], {})
    with pytest.raises(RequestError, match="message 0 is 'hello'"):
        renderer.render("", ["hello"], {})  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% for m in messages %}", "line 1: "),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append({}) }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
        ("{{ (cycler.__init__.__globals__).os.popen('id').read() }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ dict.mro() }}", "unsafe"),
        ("{% include 'secret' %}", "no loader"),
        ("{% for i in range(10**7) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "deeply|ended the process"),
        ("{{ 'a' * 10**12 }}", "memory"),
        ("{{ ['a' * 10**6] * 10**3 | length }}", "longer than|memory|TypeError"),
        ("{{ '%1000000000000s' % 1 }}", "memory|Overflow|ValueError"),
        ("{% for i in range(99999) %}0123456789{% endfor %}", "longer than 100000 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"longer than 0\.5 s"),
        ("{{ 10**(10**8) }}", r"longer than 0\.5 s|exceeds|limit"),
    ],
)
def test_a_bad_template_is_an_error_within_its_limits(renderer: ChatRenderer, template: str, complaint: str) -> None:
    """Escapes, endless loops, deep recursion and memory bombs end in an error, soon, and the next chat is served."""
    began = time.monotonic()
    with pytest.raises(RequestError, match=f"the chat template failed: .*({complaint})"):
        renderer.render(template, MESSAGES, {})
    assert time.monotonic() - began < 5
    assert renderer.render("{{ messages | length }}", MESSAGES, {}) == "2"


def test_the_size_of_a_chat_is_limited(renderer: ChatRenderer) -> None:
    """Too long a template, too many messages or too long a text are refused with both numbers."""
    with pytest.raises(RequestError, match="200001 characters, the limit is 200000"):
        renderer.render("x" * 200_001, MESSAGES, {})
    with pytest.raises(RequestError, match="21 messages, the limit is 20"):
        renderer.render("", MESSAGES[:1] * 21, {})
    with pytest.raises(RequestError, match="characters, the limit is 300000"):
        renderer.render("", [{"role": "user", "content": "x" * 300_000}], {})
    with pytest.raises(RequestError, match="not plain data"):
        renderer.render("", MESSAGES, {"tools": [object()]})


def test_the_time_limit_holds_in_other_threads(renderer: ChatRenderer) -> None:
    """Two threads, one with an endless template, each get their own answer."""
    results: dict[str, str] = {}

    def ask(name: str, template: str) -> None:
        try:
            results[name] = renderer.render(template, MESSAGES, {})
        except RequestError as error:
            results[name] = error.message

    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    threads = [threading.Thread(target=ask, args=pair) for pair in (("endless", endless), ("short", "ok"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["short"] == "ok"
    assert "longer than" in results["endless"]


def test_a_shell_with_limits_of_its_own_is_no_hindrance() -> None:
    """Under a batch system's ulimit, on addresses, CPU seconds and files, a template renders."""
    rendered = f"ChatRenderer().render('{{{{ messages | length }}}}', {MESSAGES}, {{}})"
    program = f"from paddock.text.chat import ChatRenderer; print({rendered})"
    limited = 'ulimit -v 900000 -t 30 -f 1000 && exec "$0" -c "$1"'
    done = subprocess.run(["bash", "-c", limited, sys.executable, program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_memory_is_limited_though_the_system_does_not_say_how_much_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc the limit is counted from a guess, and the other limits are set too."""
    known, limits = address_space(), []

    def refuse(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.append((kind, values[0])))
    confine(1000)
    assert known > 1 << 20
    assert limits == [(resource.RLIMIT_AS, (1 << 29) + 1000), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0)]


def test_a_closed_renderer_leaves_no_process_and_starts_anew() -> None:
    """Closing twice is fine; rendering again starts another process."""
    renderer = ChatRenderer()
    renderer.close()
    assert renderer.render("a", [], {}) == "a"
    process = renderer._process._process
    renderer.close()
    renderer.close()
    assert process is not None
    assert process.returncode is not None


def test_templates_are_chosen_by_name() -> None:
    """One template is the default; of several, tools pick tool_use, and an unknown name is an error with the nearest."""
    templates = ChatTemplates({"default": "d", "tool_use": "t"})
    assert (templates.choose(), templates.choose(tools=True), templates.choose("tool_use")) == ("d", "t", "t")
    with pytest.raises(RequestError, match="did you mean 'tool_use'"):
        templates.choose("tool_uses")
    with pytest.raises(RequestError, match="has no chat template\n") as error:
        ChatTemplates().choose()
    assert "chat_template.jinja" in error.value.fix


def test_templates_come_from_the_config_and_from_files(tmp_path: Path) -> None:
    """A text, a list of named templates, and .jinja files, which win."""
    assert read_templates(tmp_path, "x").by_name == {"default": "x"}
    named = [{"name": "default", "template": "x"}, {"name": "rag", "template": "y"}]
    assert read_templates(tmp_path, named).by_name == {"default": "x", "rag": "y"}
    (tmp_path / "chat_template.jinja").write_text("z")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert read_templates(tmp_path, named).by_name == {"default": "z", "rag": "y", "tool_use": "t"}
    with pytest.raises(CheckpointError, match="neither a text nor a list"):
        read_templates(tmp_path, 3)
