"""Calls beside the engine: every one is answered, whatever it does."""

import asyncio
import concurrent.futures
import contextlib
import threading
import time

import pytest

from mmsr1_jax.tools.tool_executor import Call, ToolExecutor


@pytest.fixture
def tool_executor():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tool_executor = ToolExecutor(pool)
        yield tool_executor
        tool_executor.close()


def submit(tool_executor, key, begin, seconds=5.0):
    tool_executor.submit(Call(key, begin, lambda *outcome: outcome, seconds))


def all_answers(tool_executor) -> dict:
    found = {}
    while len(tool_executor):
        found |= dict(tool_executor.poll(wait=True))
    return found


async def soon():
    await asyncio.sleep(0.01)
    return threading.current_thread().name


async def fails():
    raise OSError("down")


async def hangs():
    await asyncio.sleep(100)


async def blocks():
    time.sleep(3)


def test_replies_have_the_keys_of_their_calls(tool_executor):
    for key in "abc":
        submit(tool_executor, key, soon)
    submit(tool_executor, "d", fails)
    submit(tool_executor, "e", hangs, seconds=0.2)
    found = all_answers(tool_executor)
    assert {key: found[key][0] for key in "abc"} == dict.fromkeys("abc", "tools")
    assert isinstance(found["d"][1], OSError) and isinstance(found["e"][1], TimeoutError)
    assert 0.1 < found["e"][2] < 2 and len(tool_executor) == 0


def test_poll_does_not_block_without_need(tool_executor):
    submit(tool_executor, "a", hangs, seconds=30)
    begin = time.monotonic()
    assert tool_executor.poll(wait=False) == []
    tool_executor.cancel_all()
    assert tool_executor.poll(wait=True) == []  # nothing is under way: it returns at once
    assert time.monotonic() - begin < 1


def test_blocking_call_is_abandoned_and_others_are_restarted(tool_executor):
    """The others are begun again, and those to come are not held up."""
    begun = []

    async def patient():
        begun.append(1)
        await asyncio.sleep(0.3)
        return "fine"

    submit(tool_executor, "patient", patient, seconds=5)
    submit(tool_executor, "blocks", blocks, seconds=0.2)
    found = all_answers(tool_executor)
    assert isinstance(found["blocks"][1], TimeoutError)
    assert found["patient"][0] == "fine" and len(begun) == 2
    submit(tool_executor, "later", soon)
    assert all_answers(tool_executor)["later"][0] == "tools"


def test_time_blocked_by_another_call_does_not_count(tool_executor):
    async def blocks_briefly():
        time.sleep(0.8)
        return "blocked"

    async def short():
        await asyncio.sleep(0.1)
        return "short"

    submit(tool_executor, "short", short, seconds=0.5)
    submit(tool_executor, "blocks", blocks_briefly, seconds=0.5)
    found = all_answers(tool_executor)
    assert found["short"][0] == "short" and found["blocks"][0] == "blocked"


def test_call_that_ignores_cancellation_is_not_waited_for(tool_executor):
    async def stubborn():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    async def busy():  # nearly always at work, but never for long
        for _ in range(30):
            time.sleep(0.02)
            await asyncio.sleep(0)
        return "busy"

    submit(tool_executor, "stubborn", stubborn, seconds=0.1)
    submit(tool_executor, "busy", busy, seconds=30)
    found = all_answers(tool_executor)
    assert isinstance(found["stubborn"][1], TimeoutError) and found["busy"][0] == "busy"


def test_exception_of_finish_is_the_reply(tool_executor):
    def finish(value, error, seconds):
        raise KeyError("bug")

    tool_executor.submit(Call("a", soon, finish, 5.0))
    assert isinstance(all_answers(tool_executor)["a"], KeyError)


def test_timeout_covers_finish(tool_executor):
    """The answer does not wait for it, and says how long it was waited for."""
    over = threading.Event()

    def finish(value, error, seconds):
        if error is None:
            over.wait()  # as decoding of a hostile image would
        return value, error, seconds

    tool_executor.submit(Call("a", soon, finish, 0.6))
    value, error, seconds = all_answers(tool_executor)["a"]
    assert value is None and isinstance(error, TimeoutError) and seconds >= 0.5
    over.set()
    assert tool_executor.poll(wait=False) == []  # the late answer is no second one
