"""The queue of sequences that want to run: bounded for new ones, ordered by rank."""

from __future__ import annotations

import heapq

from paddock.errors import QueueFullError, RequestError
from paddock.scheduling.sequence import Sequence, Stage


class WaitingQueue:
    """Waiting sequences by rank: priority, then arrival, then index.

    Sequences that end while waiting stay in the heap, marked by their stage, until they surface or outnumber the rest.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._ended = 0  # of those in the heap

    def __len__(self) -> int:
        """Return how many sequences wait."""
        return len(self._heap) - self._ended

    def check_room(self, request_id: str, count: int) -> None:
        """Raise QueueFullError unless `count` more sequences may wait, RequestError if they never could."""
        if count > self.max_queue:
            raise RequestError(
                f"request {request_id!r} asks for n {count}: the queue holds {self.max_queue} sequences",
                fix=f"lower n to {self.max_queue}, or raise max_queue",
            )
        if len(self) + count > self.max_queue:
            raise QueueFullError(
                f"{len(self)} of at most {self.max_queue} sequences wait already: no room for {count} of request {request_id!r}",
                fix="try again when others have ended, or raise max_queue",
            )

    def push(self, seq: Sequence) -> None:
        """Add a sequence in its place; one that was preempted is never refused."""
        heapq.heappush(self._heap, (seq.rank, seq))

    def discard(self, seq: Sequence) -> None:
        """Forget a waiting sequence, whose stage already says that it ended."""
        self._ended += 1
        if self._ended > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[1].stage is not Stage.ENDED]
            heapq.heapify(self._heap)
            self._ended = 0

    def first(self) -> Sequence | None:
        """Return the sequence that runs next, or None."""
        while self._heap and self._heap[0][1].stage is Stage.ENDED:
            heapq.heappop(self._heap)
            self._ended -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Take out what `first` returned."""
        return heapq.heappop(self._heap)[1]

    def check(self) -> None:
        """Assert that the counts are true and that everyone in the queue waits."""
        live = [seq for _, seq in self._heap if seq.stage is not Stage.ENDED]
        assert self._ended == len(self._heap) - len(live), "ended sequences are miscounted"
        assert all(seq.stage is Stage.WAITING and not seq.pages for seq in live), "a queued sequence holds pages"
