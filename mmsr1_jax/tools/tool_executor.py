"""Executor that runs tools alongside the engine, on an asyncio loop in its own thread.

The engine submits calls and collects answers, and blocks only if it has no other work. Every call
gets an answer, whatever it does. A call that exceeds its time limit is cancelled without waiting
for it. While a call blocks the loop (such as `time.sleep` in a coroutine), the time of the other
calls does not count. If it keeps blocking, it is abandoned together with its thread, and the other
calls are restarted on a new loop.
"""

import asyncio
import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

_TICK = 0.1  # seconds; resolution of a call's time limit
_GRACE = 1.0  # seconds that a call may block the loop beyond its time limit
_MIN_FINISH = 0.5  # seconds; least time for `finish`, even if the call has used up its time


@dataclasses.dataclass(eq=False)
class Call:
    """A pending tool call.

    Attributes:
      key: Caller's identifier of the call.
      begin: Function that returns the coroutine to await.
      finish: Function that makes the answer, in a thread of the pool, from (result, None, elapsed
        seconds) or (None, exception, elapsed seconds); the exception of a call that exceeds its
        time limit is a TimeoutError. An exception that `finish` raises becomes the answer. If it
        does not return in time, it is called a second time, with a TimeoutError.
      seconds: Time limit of the coroutine and `finish` together.
      started: Start time of this attempt, on the monotonic clock.
      awaited: Whether the coroutine has ended, so that only `finish` remains.
      task: Task that runs the coroutine.
    """

    key: Any
    begin: Callable[[], Awaitable[Any]]
    finish: Callable[[Any, BaseException | None, float], Any]
    seconds: float
    started: float = 0.0
    awaited: bool = False
    task: asyncio.Task | None = None


class ToolExecutor:
    """Executor of tool calls, for use by a single thread.

    Args:
      pool: Thread pool that runs `Call.finish`.
    """

    def __init__(self, pool: concurrent.futures.Executor):
        self._pool = pool
        self._answers: queue.SimpleQueue[tuple[Call, Any]] = queue.SimpleQueue()
        self._calls: dict[Any, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pulse: tuple[threading.Event, float] | None = None

    def __len__(self) -> int:
        """Return the number of pending calls."""
        return len(self._calls)

    def submit(self, call: Call) -> None:
        """Start a call. Its key must differ from those of all pending calls."""
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
        """Answer a call with a TimeoutError, whatever it is still doing."""
        seconds = time.monotonic() - call.started
        self._pool.submit(self._finish, call, None, TimeoutError(reason), seconds)

    def _finish(self, call: Call, value: Any, error: BaseException | None, seconds: float) -> None:
        try:
            answer = call.finish(value, error, seconds)
        except Exception as raised:
            answer = raised
        self._answers.put((call, answer))  # only the first answer of a call counts

    def answers(self, wait: bool) -> list[tuple[Any, Any]]:
        """Return (key, answer) of the calls that have ended.

        Args:
          wait: Whether to block until at least one call has ended, if any call is pending.
        """
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
            if self._calls.get(call.key) is call:  # else answered, restarted or dropped
                del self._calls[call.key]
                found.append((call.key, answer))

    def _feel_pulse(self) -> None:
        """Check that the loop responds, and abandon it if it has not for too long."""
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
        """Cancel all calls and drop their answers."""
        for call in self._calls.values():
            call.seconds = 0.0  # a call that has not started never will
            if call.task is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(call.task.cancel)
        self._calls.clear()

    def close(self) -> None:
        """Cancel all calls and stop the thread."""
        self.forget()
        self._abandon()


async def _wait(future: asyncio.Future, budget: float) -> float:
    """Wait for a future for at most `budget` seconds and return the remaining seconds.

    Time during which another call blocks the loop does not count, as this call could not proceed.
    """
    while not future.done() and budget > 0:
        tick, before = min(budget, _TICK), time.monotonic()
        await asyncio.wait({future}, timeout=tick)
        budget -= min(time.monotonic() - before, 2 * tick)
    return budget


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then cancel the tasks that are left on it."""
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))


async def _outcome(begin: Callable[[], Awaitable[Any]]) -> tuple[Any, BaseException | None]:
    """Return (result, None) or (None, exception), even for exceptions such as SystemExit."""
    try:
        return await begin(), None
    except GeneratorExit:  # the loop was abandoned
        raise
    except BaseException as raised:
        return None, raised
