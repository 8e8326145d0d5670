"""Chat templates: messages to one prompt, rendered in a confined process, because a template is a stranger's program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from paddock.errors import CheckpointError, RequestError, did_you_mean
from paddock.text.chat_process import ChatProcess

Message = Mapping[str, Any]


@frozen(kw_only=True)
class ChatLimits:
    """What rendering one chat may take: characters in and out, messages, seconds on the clock, bytes of memory."""

    template_chars: int = 1_000_000
    messages: int = 10_000
    input_chars: int = 32_000_000
    output_chars: int = 32_000_000
    seconds: float = 5.0
    memory_bytes: int = 1 << 30


@frozen
class ChatTemplates:
    """A model's chat templates by name; most have one, `default`."""

    by_name: Mapping[str, str] = field(factory=dict)

    def choose(self, name: str | None = None, *, tools: bool = False) -> str:
        """Return the template called `name`, else `tool_use` for a chat with tools, else `default`."""
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.by_name else "default"
        if not self.by_name:
            raise RequestError(
                "the model has no chat template",
                fix="write one as chat_template.jinja beside the tokenizer, give chat_template, or generate from a plain prompt",
            )
        if name not in self.by_name:
            raise RequestError(f"the model has no chat template {name!r}", fix=did_you_mean(name, self.by_name))
        return self.by_name[name]


def read_templates(folder: Path, declared: Any) -> ChatTemplates:
    """Return the templates of a model folder: its .jinja files first, then what tokenizer_config.json `declared`.

    `declared` is one template, or a list of objects with `name` and `template`.
    """
    found: dict[str, str] = {}
    if isinstance(declared, str):
        found["default"] = declared
    elif declared is not None:
        try:
            found.update({str(entry["name"]): str(entry["template"]) for entry in declared})
        except (TypeError, KeyError):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of name and template",
                fix="fetch the file again",
            ) from None
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return ChatTemplates(found)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with every list of text parts joined by line breaks; raise RequestError for what is no message."""
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {i} is {message!r:.200}", fix='write a message as {"role": "user", "content": "..."}')
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            content = _joined(i, content)
        plain.append({**message, "content": content} if "content" in message else dict(message))
    return plain


def _joined(i: int, parts: Any) -> str:
    texts = []
    for part in parts if isinstance(parts, Sequence) else [parts]:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"message {i} holds a part that is no text: {part!r:.200}", fix="give text only")
        texts.append(part["text"])
    return "\n".join(texts)


class ChatRenderer:
    """Renders chats, one at a time, from any thread. Owns the rendering process, started on first use; `close` ends it."""

    def __init__(self, limits: ChatLimits | None = None) -> None:
        self._limits = limits or ChatLimits()
        self._process = ChatProcess(
            memory_bytes=self._limits.memory_bytes, output_chars=self._limits.output_chars, seconds=self._limits.seconds
        )

    def render(self, template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Return the prompt `template` makes of `messages`; raise RequestError when it fails or passes a limit."""
        limits = self._limits
        _within("the chat template", len(template), limits.template_chars, "characters")
        _within("the chat", len(messages), limits.messages, "messages")
        question = {"template": template, "variables": {**variables, "messages": plain_messages(messages)}}
        try:
            body = json.dumps(question)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the chat is not plain data: {error}", fix="give texts, numbers, lists and objects") from None
        _within("the chat", len(body), limits.input_chars, "characters")
        reply = self._process.ask(body.encode())
        if "text" in reply:
            return reply["text"]
        raise RequestError(f"the chat template failed: {reply['error']}", fix=_FIXES[reply["kind"]])

    def close(self) -> None:
        """End the rendering process."""
        self._process.close()


_FIXES = {
    "syntax": "give another template with chat_template",
    "render": "change the messages so that the template takes them, or give another with chat_template",
    "memory": "shorten the chat, or give another template with chat_template",
    "time": "shorten the chat, or give another template with chat_template",
}


def _within(what: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise RequestError(f"{what} has {size} {unit}, the limit is {limit}", fix=f"shorten it to {limit} {unit}")
