"""The bound on the queue."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.limits import Admission, client_of


def refused(admission: Admission, count: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught, admission.enter(count):
        raise AssertionError("it was let in")
    return caught.value


def test_places_are_counted_and_given_back() -> None:
    admission = Admission(max_running=2, max_queued=1)
    with admission.enter(2), admission.enter(1):
        assert refused(admission).status == 429
    assert admission.num_inside == 0
    with admission.enter(3):
        assert admission.num_inside == 3


def test_a_place_is_given_back_after_an_error() -> None:
    admission = Admission(max_running=1, max_queued=0)
    with pytest.raises(KeyError), admission.enter(1):
        raise KeyError
    with admission.enter(1):
        pass


def test_a_full_queue_says_when_to_come_back() -> None:
    admission = Admission(max_running=1, max_queued=3)
    for _ in range(200):
        admission.answered(8.0)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(admission.enter(1))
        error = refused(admission)
    assert error.code == "queue_full"
    # Three wait, each for an answer of eight seconds.
    assert error.headers["Retry-After"] == "24"


def test_more_prompts_than_there_are_places_is_the_clients_mistake() -> None:
    # A 429 would be retried for ever.
    assert refused(Admission(max_running=2, max_queued=1), count=4).status == 400


def test_one_client_leaves_room_for_others() -> None:
    admission = Admission(max_running=4, max_queued=4, max_per_client=3)
    with admission.enter(2, "a"), admission.enter(1, "a"):
        with pytest.raises(ApiError) as caught, admission.enter(1, "a"):
            raise AssertionError("it was let in")
        assert (caught.value.status, caught.value.code) == (429, "client_limit")
        assert int(caught.value.headers["Retry-After"]) >= 1
        with admission.enter(3, "b"):
            pass
    with admission.enter(3, "a"):
        pass
    assert refused(admission, count=4).status == 400, "such a request could never be let in"


@pytest.mark.parametrize(
    ("scope", "client"),
    [
        ({"client": ("10.0.0.7", 4711)}, "10.0.0.7"),
        ({"client": ("10.0.0.7", 4711), "api_key": "key 1"}, "key 1"),
        ({"client": None}, "unix"),
    ],
)
def test_a_client_is_a_key_or_an_address(scope: dict[str, object], client: str) -> None:
    assert client_of(scope) == client


def test_a_closed_door_refuses_with_retry_after_and_waits_for_those_inside() -> None:
    async def scenario() -> None:
        admission = Admission(max_running=1, max_queued=0)
        with admission.enter(1):
            admission.close()
            error = refused(admission)
            assert (error.status, error.code) == (503, "shutting_down")
            assert "Retry-After" in error.headers
            waiter = asyncio.create_task(admission.wait_until_empty())
            await asyncio.sleep(0)
            assert not waiter.done()
        await waiter

    asyncio.run(scenario())
