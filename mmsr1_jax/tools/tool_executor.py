"""Executor that runs tools alongside the engine, on an asyncio loop in its own thread.

The engine submits calls and collects replies, and blocks only if it has no other work. Every call
gets a reply, whatever it does. A call that exceeds its time limit is cancelled without waiting for
it. While a call blocks the loop (such as `time.sleep` in a coroutine), the time of the other calls
does not count. If it keeps blocking, it is abandoned together with its thread, and the other calls
are restarted on a new loop.
"""

import asyncio
import concurrent.futures
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

_POLL_INTERVAL = 0.1  # seconds; resolution of a call's time limit
_MAX_BLOCKING = 1.0  # seconds that a call may block the loop beyond its time limit
_MIN_FINISH_TIME = 0.5  # seconds; minimum time for `finish`, even after the time limit


@dataclasses.dataclass(eq=False)
class Call:
    """A pending tool call.

    Attributes:
      key: Caller's identifier of the call.
      start: Function that returns the coroutine to await.
      finish: Function that makes the reply, in a thread of the pool, from (result, None, elapsed
        seconds) or (None, exception, elapsed seconds); the exception of a call that exceeds its
        time limit is a TimeoutError. An exception that `finish` raises becomes the reply. If it
        does not return in time, it is called a second time, with a TimeoutError.
      timeout: Time limit in seconds of the coroutine and `finish` together.
      start_time: Start time of this attempt, on the monotonic clock.
      is_finishing: Whether the coroutine has ended, so that only `finish` remains.
      task: Task that runs the coroutine.
    """

    key: Any
    start: Callable[[], Awaitable[Any]]
    finish: Callable[[Any, BaseException | None, float], Any]
    timeout: float
    start_time: float = 0.0
    is_finishing: bool = False
    task: asyncio.Task | None = None


class ToolExecutor:
    """Executor of tool calls, for use by a single thread.

    Args:
      pool: Thread pool that runs `Call.finish`.
    """

    def __init__(self, pool: concurrent.futures.Executor):
        self._pool = pool
        self._replies: queue.SimpleQueue[tuple[Call, Any]] = queue.SimpleQueue()
        self._calls: dict[Any, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heartbeat: tuple[threading.Event, float] | None = None

    def __len__(self) -> int:
        """Return the number of pending calls."""
        return len(self._calls)

    def submit(self, call: Call) -> None:
        """Start a call. Its key must differ from those of all pending calls."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=_run_loop, args=(self._loop,), name="tools", daemon=True
            ).start()
        call.start_time = time.monotonic()
        self._calls[call.key] = call
        asyncio.run_coroutine_threadsafe(self._run(call), self._loop)

    async def _run(self, call: Call) -> None:
        call.task = asyncio.ensure_future(_outcome(call.start))
        remaining = await _wait(call.task, call.timeout)
        if not call.task.done():
            call.task.cancel()
            call.is_finishing = True
            self._time_out(call, "the tool call took too long")
            return
        value, error = call.task.result()
        call.is_finishing = True
        elapsed = time.monotonic() - call.start_time
        finishing = self._pool.submit(self._finish, call, value, error, elapsed)
        await _wait(asyncio.wrap_future(finishing), max(remaining, _MIN_FINISH_TIME))
        if not finishing.done():
            self._time_out(call, "preparing the results took too long")

    def _time_out(self, call: Call, reason: str) -> None:
        """Reply to a call with a TimeoutError, whatever it is still doing."""
        elapsed = time.monotonic() - call.start_time
        self._pool.submit(self._finish, call, None, TimeoutError(reason), elapsed)

    def _finish(self, call: Call, value: Any, error: BaseException | None, elapsed: float) -> None:
        try:
            reply = call.finish(value, error, elapsed)
        except Exception as raised:
            reply = raised
        self._replies.put((call, reply))  # only the first reply to a call counts

    def poll(self, wait: bool, seconds: float = math.inf) -> list[tuple[Any, Any]]:
        """Return (key, reply) of the calls that have ended.

        Args:
          wait: Whether to block until at least one call has ended, if any call is pending.
          seconds: Maximum number of seconds to block.
        """
        replies: list[tuple[Any, Any]] = []
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            block = wait and not replies and bool(self._calls) and left > 0
            try:
                call, reply = self._replies.get(block, min(_POLL_INTERVAL, left) if block else None)
            except queue.Empty:
                self._check_responsive()
                if not block:
                    return replies
                continue
            if self._calls.get(call.key) is call:  # else replied to, restarted or dropped
                del self._calls[call.key]
                replies.append((call.key, reply))

    def _check_responsive(self) -> None:
        """Check that the loop responds, and abandon it if it has not for too long."""
        if self._loop is None or not self._calls:
            return
        if self._heartbeat is None or self._heartbeat[0].is_set():
            self._heartbeat = threading.Event(), time.monotonic()
            self._loop.call_soon_threadsafe(self._heartbeat[0].set)
            return
        current = asyncio.current_task(self._loop)
        running = [call for call in self._calls.values() if not call.is_finishing]
        blocking = [call for call in running if current is not None and call.task is current]
        longest = max((call.timeout for call in blocking or running), default=0.0)
        if time.monotonic() - self._heartbeat[1] > longest + _MAX_BLOCKING:
            self._replace_loop(blocking, [call for call in running if call not in blocking])

    def _replace_loop(self, blocking: list[Call], others: list[Call]) -> None:
        """Time out the blocking calls, and restart the others on a new loop."""
        self._abandon_loop()
        for call in blocking:
            call.is_finishing = True
            self._time_out(call, "the tool blocks its thread")
        for call in others:
            self.submit(dataclasses.replace(call, task=None))

    def _abandon_loop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = self._heartbeat = None

    def cancel_all(self) -> None:
        """Cancel all calls and drop their replies."""
        for call in self._calls.values():
            call.timeout = 0.0  # a call that has not started never will
            if call.task is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(call.task.cancel)
        self._calls.clear()

    def close(self) -> None:
        """Cancel all calls and stop the thread."""
        self.cancel_all()
        self._abandon_loop()


async def _wait(future: asyncio.Future, remaining: float) -> float:
    """Wait for a future for at most `remaining` seconds and return the remaining seconds.

    Time during which another call blocks the loop does not count, as this call could not proceed.
    """
    while not future.done() and remaining > 0:
        tick, before = min(remaining, _POLL_INTERVAL), time.monotonic()
        await asyncio.wait({future}, timeout=tick)
        remaining -= min(time.monotonic() - before, 2 * tick)
    return remaining


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then cancel its remaining tasks."""
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))


async def _outcome(start: Callable[[], Awaitable[Any]]) -> tuple[Any, BaseException | None]:
    """Return (result, None) or (None, exception), even for exceptions such as SystemExit."""
    try:
        return await start(), None
    except GeneratorExit:  # the loop was abandoned
        raise
    except BaseException as raised:
        return None, raised
