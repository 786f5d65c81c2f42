from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.runner_queue import RunnerQueue


def queue_of(*request_ids: int) -> RunnerQueue:
    queue = RunnerQueue()
    for request_id in request_ids:
        queue.add(request_id, f"uid:{request_id % 2}")
    return queue


def order(queue: RunnerQueue, *request_ids: int) -> list[int]:
    return sorted(request_ids, key=queue.position)


def test_until_the_runner_tells_it_is_the_order_of_arrival() -> None:
    queue = queue_of(3, 4, 7)
    assert [queue.position(request_id) for request_id in (3, 4, 7)] == [0, 1, 2]
    queue.discard(3)
    assert [queue.position(request_id) for request_id in (4, 7)] == [0, 1]
    assert len(queue) == 2


def test_the_runner_decides_the_order() -> None:
    queue = queue_of(1, 2, 3)
    queue.reorder([3, 1, 2])
    assert order(queue, 1, 2, 3) == [3, 1, 2]
    queue.discard(3)
    assert queue.position(1) == 0


def test_what_arrived_since_stands_behind() -> None:
    queue = queue_of(1, 2)
    queue.reorder([2, 1])
    queue.add(3, "uid:1")
    assert order(queue, 1, 2, 3) == [2, 1, 3]
    queue.reorder([2, 1])  # sent before the runner read of 3
    assert order(queue, 1, 2, 3) == [2, 1, 3]


def test_a_request_that_the_runner_has_taken_out_is_next() -> None:
    queue = queue_of(1, 2, 3)
    queue.reorder([3, 1])
    assert queue.position(2) == 0


def test_ids_that_do_not_wait_are_ignored() -> None:
    queue = queue_of(2)
    queue.reorder([1, 9, 2])
    assert len(queue) == 1
    assert queue.position(2) == 0
    assert queue.position(9) == 0


def test_requests_of_a_caller_are_counted() -> None:
    queue = queue_of(1, 2, 3)
    assert queue.waiting_of("uid:1") == 2
    queue.reorder([3, 2, 1])
    queue.discard(3)
    assert (queue.waiting_of("uid:1"), queue.waiting_of("uid:0"), queue.waiting_of("uid:5")) == (1, 1, 0)


@given(st.sets(st.integers(1, 40)), st.lists(st.integers(1, 50)))
def test_whatever_a_runner_says_everybody_has_a_place_of_their_own(waiting: set[int], told: list[int]) -> None:
    queue = queue_of(*sorted(waiting))
    queue.reorder(told)
    assert sorted(queue.position(request_id) for request_id in waiting) == list(range(len(waiting)))
