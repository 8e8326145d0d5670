"""Stop strings, found wherever token borders fall."""

from __future__ import annotations

from collections.abc import Iterable


class _Matcher:
    """How much of one stop string the text so far ends with (Knuth, Morris and Pratt): each character costs O(1)."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self._fallback = [0] * len(stop)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[i] == stop[length]
            self._fallback[i] = length

    def feed(self, character: str) -> bool:
        """Take one character and return whether the stop string is complete with it."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        if self.matched < len(self.stop):
            return False
        self.matched = self._fallback[-1]
        return True


class StopStrings:
    """Watches a text for stop strings and lets through only what cannot be the start of one.

    The stop string completed first ends the text (of several completed by one character, the longest), so the result does
    not depend on where token borders fall. With `include` the stop string stays in the text, and nothing is held back.
    """

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Return the text that may be shown now; `found` says whether a stop string ended it.

        While not `armed` (fewer than min_tokens tokens so far) a completed stop string does not count.
        """
        if not self._matchers or self.found is not None:
            return "" if self.found is not None else text
        for end, character in enumerate(text, 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.feed(character)]
            if complete and armed:
                self.found = max(complete, key=len)
                return self._ended(text[:end], self.found)
        if self._include:
            return text
        window = self._held + text
        cut = len(window) - max(matcher.matched for matcher in self._matchers)
        self._held = window[cut:]
        return window[:cut]

    def finish(self) -> str:
        """Return what was held back: no more text comes, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _ended(self, text: str, stop: str) -> str:
        if self._include:
            return text
        window, self._held = self._held + text, ""
        return window.removesuffix(stop)
