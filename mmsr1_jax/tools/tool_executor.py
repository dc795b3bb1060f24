"""Tools beside the engine: an asyncio loop in a thread of its own.

The engine hands calls in and takes answers out; it never waits unless nothing else can be done.
Whatever a call does, an answer comes back. A call whose time is over is cancelled and not waited
for. While a call blocks the loop (a `time.sleep` in a coroutine) the others' time stands still; if
it does not stop, it is left behind with its thread, and the others are begun again on a new loop.
"""

import asyncio
import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

_TICK = 0.1  # seconds in which a call's time is counted
_GRACE = 1.0  # seconds that the loop may be blocked for beyond the time of the call that does it
_MIN_FINISH = 0.5  # seconds that `finish` has where the call has used up all of its time


@dataclasses.dataclass(eq=False)
class Call:
    """A call under way.

    Attributes:
      key: what the caller knows it by.
      begin: makes the coroutine to be awaited.
      finish: makes the answer, in a thread of a pool, from (result, None, seconds taken) or
        (None, the exception, seconds taken); a call whose time is over ends with a TimeoutError.
        What it raises itself is the answer. It is called a second time, with a TimeoutError, where
        the first call does not return in time.
      seconds: time limit of both together.
      started: on the monotonic clock, of this attempt.
      awaited: the coroutine is at its end, and only `finish` is to come.
      task: of the coroutine.
    """

    key: Any
    begin: Callable[[], Awaitable[Any]]
    finish: Callable[[Any, BaseException | None, float], Any]
    seconds: float
    started: float = 0.0
    awaited: bool = False
    task: asyncio.Task | None = None


class Background:
    """Runs calls and collects their answers, for one thread.

    Args of the constructor:
      pool: where calls are finished.
    """

    def __init__(self, pool: concurrent.futures.Executor):
        self._pool = pool
        self._answers: queue.SimpleQueue[tuple[Call, Any]] = queue.SimpleQueue()
        self._calls: dict[Any, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pulse: tuple[threading.Event, float] | None = None

    def __len__(self) -> int:
        """Calls under way."""
        return len(self._calls)

    def submit(self, call: Call) -> None:
        """Starts a call; no other under way has its key."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name="tools", daemon=True).start()
        call.started = time.monotonic()
        self._calls[call.key] = call
        asyncio.run_coroutine_threadsafe(self._run(call), self._loop)

    async def _run(self, call: Call) -> None:
        call.task = asyncio.ensure_future(_outcome(call.begin))
        budget = await _wait(call.task, call.seconds)
        if not call.task.done():
            call.task.cancel()
            call.awaited = True
            self._give_up(call, "the call took too long")
            return
        value, error = call.task.result()
        call.awaited = True
        seconds = time.monotonic() - call.started
        finishing = self._pool.submit(self._finish, call, value, error, seconds)
        await _wait(asyncio.wrap_future(finishing), max(budget, _MIN_FINISH))
        if not finishing.done():
            self._give_up(call, "the results took too long to be prepared")

    def _give_up(self, call: Call, reason: str) -> None:
        """Answer a call with a TimeoutError, whatever it still does."""
        seconds = time.monotonic() - call.started
        self._pool.submit(self._finish, call, None, TimeoutError(reason), seconds)

    def _finish(self, call: Call, value: Any, error: BaseException | None, seconds: float) -> None:
        try:
            answer = call.finish(value, error, seconds)
        except Exception as raised:
            answer = raised
        self._answers.put((call, answer))  # the first answer of a call counts, see `answers`

    def answers(self, wait: bool) -> list[tuple[Any, Any]]:
        """(key, answer) of the calls that have come to an end; `wait`: at least one of them, where
        any call is under way."""
        found: list[tuple[Any, Any]] = []
        while True:
            block = wait and not found and bool(self._calls)
            try:
                call, answer = self._answers.get(block, _TICK)
            except queue.Empty:
                self._feel_pulse()
                if not block:
                    return found
                continue
            if self._calls.get(call.key) is call:  # else it was given up
                del self._calls[call.key]
                found.append((call.key, answer))

    def _feel_pulse(self) -> None:
        """Asks the loop for a sign of life, and leaves it behind if it gives none for too long."""
        if self._loop is None or not self._calls:
            return
        if self._pulse is None or self._pulse[0].is_set():
            self._pulse = threading.Event(), time.monotonic()
            self._loop.call_soon_threadsafe(self._pulse[0].set)
            return
        at_work = asyncio.current_task(self._loop)
        running = [call for call in self._calls.values() if not call.awaited]
        guilty = [call for call in running if at_work is not None and call.task is at_work]
        silent = time.monotonic() - self._pulse[1]
        if silent > _GRACE + max((call.seconds for call in guilty or running), default=0.0):
            self._leave_behind(guilty, [call for call in running if call not in guilty])

    def _leave_behind(self, guilty: list[Call], others: list[Call]) -> None:
        self._abandon()
        for call in guilty:
            call.awaited = True
            self._give_up(call, "the tool blocks its thread")
        for call in others:
            self.submit(dataclasses.replace(call, task=None))

    def _abandon(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = self._pulse = None

    def forget(self) -> None:
        """Cancels all calls; what they still do is lost."""
        for call in self._calls.values():
            call.seconds = 0.0  # one that has not begun never will
            if call.task is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(call.task.cancel)
        self._calls.clear()

    def close(self) -> None:
        """The same, and ends the thread."""
        self.forget()
        self._abandon()


async def _wait(future: asyncio.Future, budget: float) -> float:
    """Wait for a future, at most `budget` seconds; return the seconds that remain.

    Time in which another call blocks the loop does not count: this one could not proceed.
    """
    while not future.done() and budget > 0:
        tick, before = min(budget, _TICK), time.monotonic()
        await asyncio.wait({future}, timeout=tick)
        budget -= min(time.monotonic() - before, 2 * tick)
    return budget


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped, and cancels what is then left on it."""
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))


async def _outcome(begin: Callable[[], Awaitable[Any]]) -> tuple[Any, BaseException | None]:
    """(result, None) or (None, what was raised); a tool may raise what it likes, SystemExit too."""
    try:
        return await begin(), None
    except GeneratorExit:  # the loop was left behind
        raise
    except BaseException as raised:
        return None, raised
