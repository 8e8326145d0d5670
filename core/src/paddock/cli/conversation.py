"""A conversation that always fits the model: what does not is forgotten, oldest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddock.llm import LLM

Message = dict[str, str]


class Conversation:
    """The messages so far. `room` is how many tokens an answer should have, as far as the model's length allows."""

    def __init__(self, llm: LLM, *, system: str | None, room: int) -> None:
        self._llm = llm
        self._head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._room = min(room, llm.max_model_len // 4)
        self.messages: list[Message] = []

    def ask(self, text: str) -> tuple[dict[str, Any], int]:
        """Add the user's message and return the prompt, and how many old messages were forgotten so that it fits."""
        self.messages.append({"role": "user", "content": text})
        dropped = 0
        while True:
            prompt = self._llm.chat_prompt([*self._head, *self.messages])
            if len(prompt["prompt_token_ids"]) + self._room <= self._llm.max_model_len or len(self.messages) == 1:
                return prompt, dropped
            turn = min(2, len(self.messages) - 1)
            del self.messages[:turn]
            dropped += turn

    def answered(self, text: str) -> None:
        """Add the model's message."""
        self.messages.append({"role": "assistant", "content": text})

    def retract(self) -> None:
        """Take back the user's last message."""
        del self.messages[-1:]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages.clear()
