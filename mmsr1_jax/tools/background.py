"""Tools beside the engine: an asyncio loop in a thread of its own.

The engine hands calls in and takes answers out; it never waits unless nothing else can be done.
Whatever a call does, an answer comes back. A call that blocks the loop (a `time.sleep` in a
coroutine) or will not be cancelled is left behind with its thread, and the others are begun again
on a new loop, with their whole time.
"""

import asyncio
import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

# Seconds for which an answer may be overdue before the loop is taken to be blocked.
_GRACE = 1.0


@dataclasses.dataclass(eq=False)
class Call:
    """A call under way.

    Attributes:
      key: what the caller knows it by.
      begin: makes the coroutine to be awaited, for at most `seconds`.
      finish: makes the answer, in a thread of a pool, from (result, None, seconds taken) or
        (None, the exception, seconds taken); a call whose time is over ends with a TimeoutError.
        What it raises itself is the answer.
      seconds: time limit.
      started: on the monotonic clock, of this attempt.
      awaited: the coroutine is at its end, and only `finish` is to come.
      future: by which it is cancelled; task: on the loop, once it has begun there.
    """

    key: Any
    begin: Callable[[], Awaitable[Any]]
    finish: Callable[[Any, BaseException | None, float], Any]
    seconds: float
    started: float = 0.0
    awaited: bool = False
    future: concurrent.futures.Future | None = None
    task: asyncio.Task | None = None

    def is_late(self, now: float) -> bool:
        return not self.awaited and now > self.started + self.seconds + _GRACE


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
        call.future = asyncio.run_coroutine_threadsafe(self._run(call), self._loop)

    async def _run(self, call: Call) -> None:
        call.task = asyncio.current_task()
        value, error = None, None
        try:
            async with asyncio.timeout(call.seconds):
                value = await call.begin()
        except GeneratorExit:  # the loop was left behind
            raise
        except BaseException as raised:  # a tool may raise what it likes, SystemExit too
            error = raised
        call.awaited = True
        seconds = time.monotonic() - call.started
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self._pool, call.finish, value, error, seconds)
        except Exception as raised:
            answer = raised
        self._answers.put((call, answer))

    def answers(self, wait: bool) -> list[tuple[Any, Any]]:
        """(key, answer) of the calls that have come to an end; `wait`: at least one of them, where
        any call is under way."""
        found: list[tuple[Any, Any]] = []
        while True:
            block = wait and not found and bool(self._calls)
            try:
                call, answer = self._answers.get(block, 0.1)
            except queue.Empty:
                found += self._overdue()
                if found or not block:
                    return found
                continue
            if self._calls.get(call.key) is call:  # else it was given up
                del self._calls[call.key]
                found.append((call.key, answer))

    def _overdue(self) -> list[tuple[Any, Any]]:
        """Answers in the place of calls that did not even time out; their loop is left behind.

        Where one of them blocks the loop, only that one is to blame."""
        now = time.monotonic()
        late = [call for call in self._calls.values() if call.is_late(now)]
        if not late:
            return []
        at_work = asyncio.current_task(self._loop)
        blocking = [call for call in self._calls.values() if at_work and call.task is at_work]
        guilty = blocking or late
        others = [call for call in self._calls.values() if call not in guilty]
        self.close()
        for call in others:
            self.submit(dataclasses.replace(call, awaited=False))
        error = TimeoutError("the tool blocks its thread, or will not be cancelled")
        return [(call.key, call.finish(None, error, now - call.started)) for call in guilty]

    def forget(self) -> None:
        """Cancels all calls; what they still do is lost."""
        for call in self._calls.values():
            call.future.cancel()
        self._calls.clear()

    def close(self) -> None:
        """The same, and ends the thread."""
        self.forget()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped; then what is left on it is cancelled."""
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    # A task that will not be cancelled is left to the end of the process.
    loop.run_until_complete(asyncio.wait(tasks, timeout=_GRACE) if tasks else asyncio.sleep(0))
