from __future__ import annotations

import pytest
from core.tests.scheduling.driver import request

from paddock.errors import QueueFullError, RequestError
from paddock.scheduling.sequence import Sequence, Stage, sequences_of
from paddock.scheduling.waiting import WaitingQueue


def waiting(arrival: int, *, priority: int = 0, n: int = 1) -> list[Sequence]:
    """Return the sequences of the request that came as number `arrival`."""
    return sequences_of(request(f"r{arrival}", 3, priority=priority, n=n), arrival, 32)


def end(queue: WaitingQueue, seq: Sequence) -> None:
    """End a waiting sequence."""
    seq.stage = Stage.ENDED
    queue.discard(seq)
    queue.check()


def test_lower_priority_comes_first_and_equals_in_order_of_arrival() -> None:
    """The order of pushing does not matter."""
    queue = WaitingQueue(10)
    for arrival, priority in ((3, 0), (2, 1), (0, 1), (1, 0)):
        queue.push(*waiting(arrival, priority=priority))
    assert [queue.pop().request_id for _ in range(4)] == ["r1", "r3", "r0", "r2"]


def test_a_full_queue_names_its_size_and_the_way_out() -> None:
    """There is room for as many as it says and not for one more."""
    queue = WaitingQueue(2)
    queue.push(*waiting(0))
    queue.check_room("r1", 1)
    with pytest.raises(QueueFullError, match=r"1 of at most 2 sequences.*'r1'\n.*raise max_queue"):
        queue.check_room("r1", 2)


def test_a_request_larger_than_the_queue_is_not_told_to_try_again() -> None:
    """It could never wait, so the error is of the other kind and names both numbers."""
    with pytest.raises(RequestError, match=r"n 3: the queue holds 2") as caught:
        WaitingQueue(2).check_room("r0", 3)
    assert not isinstance(caught.value, QueueFullError)


def test_ended_sequences_neither_count_nor_come_up() -> None:
    """Whatever is discarded, the rest keeps its order."""
    queue = WaitingQueue(100)
    seqs = [seq for arrival in range(20) for seq in waiting(arrival, n=2)]
    for seq in seqs:
        queue.push(seq)
    for seq in seqs[30:10:-1]:
        end(queue, seq)
    assert len(queue) == 20
    assert [queue.pop() for _ in range(11)] == seqs[:11]
    assert queue.first() is seqs[31]


def test_many_aborts_do_not_fill_the_heap() -> None:
    """Ended sequences are dropped before they outnumber the living, though none of them surfaces."""
    queue = WaitingQueue(10)
    queue.push(*waiting(0))
    for arrival in range(1, 200):
        queue.push(*waiting(arrival))
        end(queue, queue._heap[-1][1])
    assert len(queue._heap) < 4
