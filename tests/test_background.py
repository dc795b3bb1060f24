"""Calls beside the engine: every one is answered, whatever it does."""

import asyncio
import concurrent.futures
import contextlib
import threading
import time

import pytest

from mmsr1_jax.tools.tool_executor import Background, Call


@pytest.fixture
def background():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        background = Background(pool)
        yield background
        background.close()


def submit(background, key, begin, seconds=5.0):
    background.submit(Call(key, begin, lambda *outcome: outcome, seconds))


def all_answers(background) -> dict:
    found = {}
    while len(background):
        found |= dict(background.answers(wait=True))
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


def test_answers_come_with_their_keys(background):
    for key in "abc":
        submit(background, key, soon)
    submit(background, "d", fails)
    submit(background, "e", hangs, seconds=0.2)
    found = all_answers(background)
    assert {key: found[key][0] for key in "abc"} == dict.fromkeys("abc", "tools")
    assert isinstance(found["d"][1], OSError) and isinstance(found["e"][1], TimeoutError)
    assert 0.1 < found["e"][2] < 2 and len(background) == 0


def test_nothing_waits_that_need_not(background):
    submit(background, "a", hangs, seconds=30)
    begin = time.monotonic()
    assert background.answers(wait=False) == []
    background.forget()
    assert background.answers(wait=True) == []  # nothing is under way: it returns at once
    assert time.monotonic() - begin < 1


def test_a_call_that_blocks_is_left_behind(background):
    """The others are begun again, and those to come are not held up."""
    begun = []

    async def patient():
        begun.append(1)
        await asyncio.sleep(0.3)
        return "fine"

    submit(background, "patient", patient, seconds=5)
    submit(background, "blocks", blocks, seconds=0.2)
    found = all_answers(background)
    assert isinstance(found["blocks"][1], TimeoutError)
    assert found["patient"][0] == "fine" and len(begun) == 2
    submit(background, "later", soon)
    assert all_answers(background)["later"][0] == "tools"


def test_a_call_that_blocks_for_a_while_costs_the_others_nothing(background):
    async def blocks_briefly():
        time.sleep(0.8)
        return "blocked"

    async def short():
        await asyncio.sleep(0.1)
        return "short"

    submit(background, "short", short, seconds=0.5)
    submit(background, "blocks", blocks_briefly, seconds=0.5)
    found = all_answers(background)
    assert found["short"][0] == "short" and found["blocks"][0] == "blocked"


def test_a_call_that_will_not_be_cancelled_is_not_waited_for(background):
    async def stubborn():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    async def busy():  # nearly always at work, but never for long
        for _ in range(30):
            time.sleep(0.02)
            await asyncio.sleep(0)
        return "busy"

    submit(background, "stubborn", stubborn, seconds=0.1)
    submit(background, "busy", busy, seconds=30)
    found = all_answers(background)
    assert isinstance(found["stubborn"][1], TimeoutError) and found["busy"][0] == "busy"


def test_what_finish_raises_is_the_answer(background):
    def finish(value, error, seconds):
        raise KeyError("bug")

    background.submit(Call("a", soon, finish, 5.0))
    assert isinstance(all_answers(background)["a"], KeyError)


def test_the_time_of_a_call_covers_the_preparation_of_its_results(background):
    """The answer does not wait for it, and says how long it was waited for."""
    over = threading.Event()

    def finish(value, error, seconds):
        if error is None:
            over.wait()  # as decoding of a hostile image would
        return value, error, seconds

    background.submit(Call("a", soon, finish, 0.6))
    value, error, seconds = all_answers(background)["a"]
    assert value is None and isinstance(error, TimeoutError) and seconds >= 0.5
    over.set()
    assert background.answers(wait=False) == []  # the late answer is no second one
