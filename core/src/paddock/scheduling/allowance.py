"""How many tokens a step may hold now: what the limits say, or fewer after a step that found too little memory on the device.

A step that did not fit is followed by steps of at most half its tokens, so of at most so many sequences too: each takes one.
`PATIENCE` committed steps later the allowance doubles, until it is whole again. A shortage after a doubling says that it came
too early: the patience doubles with it. So a sequence that grows back into the same shortage again and again has each time
longer to get on, and comes to its end.
"""

from __future__ import annotations

from paddock import log
from paddock.scheduling.step import Step

PATIENCE = 64  # about a second of decodes: a shortage costs a wait for the device and the tokens computed anew


class StepAllowance:
    """The most `tokens` of a step."""

    def __init__(self, limit: int) -> None:
        """Allow all that the limits do."""
        self._limit = self.tokens = limit
        self._patience = PATIENCE
        self._committed = 0  # steps since the allowance last changed
        self._has_grown = False  # since the last shortage

    @property
    def is_whole(self) -> bool:
        """Return whether the limit alone holds."""
        return self.tokens == self._limit

    def shrink_below(self, step: Step) -> bool:
        """Allow half of a step that did not fit and return True, or False if there is no smaller one."""
        half = step.num_tokens // 2
        self.tokens = half or self.tokens
        if self._has_grown:
            self._patience *= 2
        self._committed, self._has_grown = 0, False
        log.get_logger().warning(
            "step_out_of_memory",
            tokens=step.num_tokens,
            decodes=len(step.decode_slots),
            prefills=len(step.prefills),
            tokens_allowed=self.tokens,
            tokens_limit=self._limit,
        )
        return half > 0

    def count_committed(self) -> None:
        """Count a step that ran; after enough of them allow twice as much, at last what the limits say."""
        if self.is_whole:
            return
        self._committed += 1
        if self._committed < self._patience:
            return
        self.tokens = min(2 * self.tokens, self._limit)
        self._committed, self._has_grown = 0, self.tokens < self._limit
        if not self._has_grown:
            self._patience = PATIENCE
        log.get_logger().info("step_allowance_grown", tokens_allowed=self.tokens, tokens_limit=self._limit)
