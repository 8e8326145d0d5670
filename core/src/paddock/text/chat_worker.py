"""The process that renders chat templates: a sandboxed jinja2 under memory and CPU limits, driven over its own pipes.

The first frame out says the process is ready; then one frame in (a template, its variables) gives one frame out (the text, or
an error and its kind).
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from paddock.text.frames import LENGTH_BYTES, frame, length


class Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` ... `{% endgeneration %}` through: training marks the assistant's words with it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it off the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the statements inside, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> NoReturn:
    """End the rendering with the template's own message."""
    raise jinja2.TemplateError(str(message))


def strftime_now(format: str) -> str:
    """Return the local date and time in `format`."""
    return datetime.now().strftime(format)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return `value` as JSON, without the escapes for HTML that jinja2's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.Environment:
    """Return the environment chat templates are written for: the one Hugging Face renders them in."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def render(template: jinja2.Template, variables: dict[str, Any], output_chars: int) -> str:
    """Return the rendered text, stopping as soon as it is longer than `output_chars`."""
    chunks, size = [], 0
    for chunk in template.generate(variables):
        size += len(chunk)
        if size > output_chars:
            raise jinja2.TemplateError(f"the text is longer than {output_chars} characters")
        chunks.append(chunk)
    return "".join(chunks)


def answer(question: dict[str, Any], compile_template: Any, output_chars: int) -> dict[str, str]:
    """Return the text, or what went wrong: in the template (`syntax`), while rendering (`render`), or out of memory."""
    try:
        template = compile_template(question["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "kind": "syntax"}
    except RecursionError:
        return {"error": "it nests too deeply", "kind": "syntax"}
    try:
        return {"text": render(template, question["variables"], output_chars)}
    except jinja2.TemplateError as error:
        return {"error": error.message or type(error).__name__, "kind": "render"}
    except MemoryError:
        return {"error": "it needs too much memory", "kind": "memory"}
    except RecursionError:
        return {"error": "it nests too deeply", "kind": "render"}
    except Exception as error:  # a template can raise whatever an operator or a filter raises
        return {"error": f"{type(error).__name__}: {error}"[:1000], "kind": "render"}


def confine(memory_bytes: int) -> None:
    """Let this process grow by `memory_bytes`, write no files and start no processes, as far as the system can say so."""
    import resource

    lower(resource.RLIMIT_AS, address_space() + memory_bytes)
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_NPROC, 0)


def address_space() -> int:
    """Return how many bytes of addresses this process has, or half a GiB, some times that, where the system does not say."""
    import resource

    try:
        with open("/proc/self/statm") as statm:  # noqa: PTH123 - nothing else here needs pathlib
            return int(statm.read().split()[0]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 1 << 29


def lower(kind: int, limit: int) -> None:
    """Set one of this process's limits, never above those it was given; a system without that limit is left alone."""
    import resource

    limit = min([limit, *(given for given in resource.getrlimit(kind) if given != resource.RLIM_INFINITY)])
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (limit, limit))


def allow_seconds(seconds: float) -> None:
    """End this process once it has computed `seconds` more: a guard for when nobody is left to end it."""
    import resource

    spent = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(spent.ru_utime + spent.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def write_frame(stream: BinaryIO, value: Any) -> None:
    """Write one frame."""
    stream.write(frame(json.dumps(value).encode()))
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """Return the next frame, or None at the end of the stream."""
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return json.loads(stream.read(length(head)))


def main() -> None:
    """Serve frames until the other side closes its end."""
    memory_bytes, output_chars, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    compile_template = lru_cache(maxsize=8)(make_environment().from_string)
    confine(memory_bytes)
    write_frame(sys.stdout.buffer, "ready")
    while (question := read_frame(sys.stdin.buffer)) is not None:
        allow_seconds(seconds)
        reply = answer(question, compile_template, output_chars)
        write_frame(sys.stdout.buffer, reply)
        if reply.get("kind") == "memory":
            return


if __name__ == "__main__":
    main()
