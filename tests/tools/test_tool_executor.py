"""The tool executor: every call gets a reply, whatever it does."""

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


def submit(tool_executor, key, start, timeout=5.0):
    tool_executor.submit(Call(key, start, lambda *outcome: outcome, timeout))


def all_replies(tool_executor) -> dict:
    replies = {}
    while len(tool_executor):
        replies |= dict(tool_executor.poll(wait=True))
    return replies


async def succeeds():
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
        submit(tool_executor, key, succeeds)
    submit(tool_executor, "d", fails)
    submit(tool_executor, "e", hangs, timeout=0.2)
    replies = all_replies(tool_executor)
    assert {key: replies[key][0] for key in "abc"} == dict.fromkeys("abc", "tools")
    assert isinstance(replies["d"][1], OSError) and isinstance(replies["e"][1], TimeoutError)
    assert 0.1 < replies["e"][2] < 2 and len(tool_executor) == 0


def test_poll_does_not_block_without_need(tool_executor):
    submit(tool_executor, "a", hangs, timeout=30)
    start = time.monotonic()
    assert tool_executor.poll(wait=False) == []
    tool_executor.cancel_all()
    assert tool_executor.poll(wait=True) == []  # no call is pending: it returns at once
    assert time.monotonic() - start < 1


def test_blocking_call_is_abandoned_and_others_are_restarted(tool_executor):
    """The other calls are restarted, and later calls are not delayed."""
    starts = []

    async def patient():
        starts.append(1)
        await asyncio.sleep(0.3)
        return "fine"

    submit(tool_executor, "patient", patient, timeout=5)
    submit(tool_executor, "blocks", blocks, timeout=0.2)
    replies = all_replies(tool_executor)
    assert isinstance(replies["blocks"][1], TimeoutError)
    assert replies["patient"][0] == "fine" and len(starts) == 2
    submit(tool_executor, "later", succeeds)
    assert all_replies(tool_executor)["later"][0] == "tools"


def test_time_blocked_by_another_call_does_not_count(tool_executor):
    async def blocks_briefly():
        time.sleep(0.8)
        return "blocked"

    async def short():
        await asyncio.sleep(0.1)
        return "short"

    submit(tool_executor, "short", short, timeout=0.5)
    submit(tool_executor, "blocks", blocks_briefly, timeout=0.5)
    replies = all_replies(tool_executor)
    assert replies["short"][0] == "short" and replies["blocks"][0] == "blocked"


def test_call_that_ignores_cancellation_is_not_waited_for(tool_executor):
    async def stubborn():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    async def busy():  # blocks the loop most of the time, but never for long
        for _ in range(30):
            time.sleep(0.02)
            await asyncio.sleep(0)
        return "busy"

    submit(tool_executor, "stubborn", stubborn, timeout=0.1)
    submit(tool_executor, "busy", busy, timeout=30)
    replies = all_replies(tool_executor)
    assert isinstance(replies["stubborn"][1], TimeoutError) and replies["busy"][0] == "busy"


def test_exception_of_finish_is_the_reply(tool_executor):
    def finish(value, error, elapsed):
        raise KeyError("bug")

    tool_executor.submit(Call("a", succeeds, finish, 5.0))
    assert isinstance(all_replies(tool_executor)["a"], KeyError)


def test_timeout_covers_finish(tool_executor):
    """The reply does not wait for `finish`, and contains the elapsed time."""
    finish_decoding = threading.Event()

    def finish(value, error, elapsed):
        if error is None:
            finish_decoding.wait()  # as decoding a hostile image would
        return value, error, elapsed

    tool_executor.submit(Call("a", succeeds, finish, 0.6))
    value, error, elapsed = all_replies(tool_executor)["a"]
    assert value is None and isinstance(error, TimeoutError) and elapsed >= 0.5
    finish_decoding.set()
    assert tool_executor.poll(wait=False) == []  # the late reply is dropped
