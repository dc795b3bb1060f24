"""Worker processes for CPU work on untrusted bytes: decoding images, extracting page text.

A thread cannot be stopped, so a malicious page or image could occupy it forever and keep the
process from exiting. Such work therefore runs in a small pool of processes, and each task has
limits on CPU time, wall time and memory. If a task exceeds a limit, its process is killed and
replaced, and other tasks are unaffected.

Short tasks do not queue behind long ones. A task that has used 0.5 s of CPU time is stopped and run
again, with its full limit, once no new task is waiting. A few hundred malicious pages thus delay
a benign one by about half a second each, not by their full limits. A task that is already in its
second run is not interrupted, and its wall time restarts.

Workers are spawned by exec, never forked. They import neither JAX nor the program's main module.
All environment variables outside `_ENVIRONMENT` are blank in them, so they cannot read API keys.
They are killed when this process exits. If this process is killed, an idle worker ends immediately
and a busy one at its CPU limit.
"""

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pickle
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pebble
from loky.backend.context import LokyContext

_ENVIRONMENT = frozenset((
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
))  # fmt: skip
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_FIRST_RUN_CPU_TIME = (
    0.5  # seconds of CPU time after which a task yields to tasks that have not run yet
)
_START_TIMEOUT = 5.0  # seconds that starting or ending a worker may take
_CPU_TIME_CODES = (-signal.SIGPROF, -signal.SIGXCPU)  # exit codes of a process out of CPU time
_SHUTTING_DOWN = "the program is shutting down"
_POLL_INTERVAL = 0.2  # seconds between checks for interpreter shutdown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one task.

    Attributes:
      cpu_seconds: CPU time. This is the main limit against malicious input, as it does not depend
        on the load of the machine.
      wall_seconds: Time since a worker accepted the task.
      memory_bytes: Address space in addition to that of the worker before the task.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30


DEFAULT_LIMITS = Limits()


class WorkerError(Exception):
    """A task that exceeded a limit, or whose process died; the message gives the reason."""


class LimitError(WorkerError):
    """A task that exceeded its CPU time or memory, and would again if retried."""


def run(function: Callable[..., Any], *args: Any, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Run `function(*args)` in a worker process and return the result. Blocks the calling thread.

    Args:
      function: Module-level function of a module that does not import JAX.
      args: Picklable arguments.
      limits: Limits of this task. Time in the queue does not count.

    Raises:
      WorkerError: A limit was exceeded, the process died, or the interpreter is shutting down.
      Exception: The function's own exception.
    """
    future = _POOL.submit(function, args, limits)
    while True:
        try:
            return future.result(timeout=_POLL_INTERVAL)
        except concurrent.futures.TimeoutError:
            # The interpreter joins threads at shutdown, so they must not wait for a worker.
            if not threading.main_thread().is_alive():
                future.cancel()
                raise WorkerError(_SHUTTING_DOWN) from None
        except concurrent.futures.CancelledError:
            raise WorkerError("the worker pool was closed") from None


async def run_async(
    function: Callable[..., Any], *args: Any, limits: Limits = DEFAULT_LIMITS
) -> Any:
    """Run a function in a worker process like `run`. Cancelling the coroutine stops the task."""
    return await asyncio.wrap_future(_POOL.submit(function, args, limits))


def count() -> int:
    """Return the number of worker processes."""
    return _POOL.size


def close() -> None:
    """Kill the workers and cancel waiting tasks. A later task starts new workers."""
    _POOL.close()


@dataclasses.dataclass(eq=False)
class _Task:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    limits: Limits
    future: concurrent.futures.Future
    deadline: float = math.inf  # on the monotonic clock, after which the task is abandoned
    long: bool = False  # exceeded `_FIRST_RUN_CPU_TIME`, so it runs again with its full limit

    def limits_now(self) -> Limits:
        """Return the limits of the next run."""
        first = min(_FIRST_RUN_CPU_TIME, self.limits.cpu_seconds)
        return self.limits if self.long else dataclasses.replace(self.limits, cpu_seconds=first)


class _Pool:
    """Task queue of several worker processes, each in its own pebble pool.

    The workers of a single pebble pool would share a pipe, and a worker killed while writing would
    break it for all. Tasks wait in this queue and not in the pipe, because a cancelled task cannot
    be removed from a pipe.

    Args:
      size: Number of workers.
    """

    def __init__(self, size: int):
        self.size = size
        self._lock = threading.RLock()
        self._waiting: collections.deque[_Task] = collections.deque()
        self._long: collections.deque[_Task] = collections.deque()
        self._idle: list[pebble.ProcessPool] = []
        self._running: dict[_Task, pebble.ProcessPool] = {}
        self._watching = False

    def submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], limits: Limits
    ) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            self._waiting.append(_Task(function, args, limits, future))
        self._dispatch()
        return future

    def close(self) -> None:
        with self._lock:
            waiting = [*self._waiting, *self._long]
            self._waiting.clear()
            self._long.clear()
            running, self._running = self._running, {}
            idle, self._idle = self._idle, []
        for task in waiting:
            task.future.cancel()
        for task in running:
            _settle(task, WorkerError("the worker pool was closed"))
        for worker in (*idle, *running.values()):
            worker.stop()  # stop all of them before waiting for any
        for worker in (*idle, *running.values()):
            _end(worker, wait=True)

    def _dispatch(self) -> None:
        """Assign waiting tasks to idle workers."""
        with self._lock:
            while len(self._running) < self.size and (queue := self._waiting or self._long):
                task = queue.popleft()
                if task.future.cancelled():
                    continue
                try:
                    worker = self._idle.pop() if self._idle else _new_worker()
                    inner = worker.schedule(
                        _limited,
                        args=(task.function, task.args, task.limits_now()),
                        timeout=task.limits.wall_seconds,
                    )
                except Exception as error:
                    reason = f"no worker could be started: {error}"
                    if not threading.main_thread().is_alive():  # Python 3.12 starts no threads then
                        reason = _SHUTTING_DOWN
                    _settle(task, WorkerError(reason))
                    continue
                task.deadline = time.monotonic() + task.limits.wall_seconds + _START_TIMEOUT
                self._running[task] = worker
                task.future.add_done_callback(lambda outer, inner=inner: inner.cancel())
                inner.add_done_callback(lambda ended, task=task: self._finished(task, ended))
                if not self._watching:
                    self._watching = True
                    threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def _finished(self, task: _Task, inner: concurrent.futures.Future) -> None:
        with self._lock:
            worker = self._running.pop(task, None)
            succeeded = not inner.cancelled() and inner.exception() is None
            retry = (
                worker is not None
                and not task.long
                and task.limits.cpu_seconds > _FIRST_RUN_CPU_TIME
                and _out_of_cpu_time(inner)
            )
            if worker is not None and succeeded:
                self._idle.append(worker)
            if retry:
                task.long = True
                self._long.append(task)
        if worker is not None:  # otherwise the task was abandoned
            if not succeeded:  # it was killed, perhaps in the middle of writing to its pipe
                _end(worker)
            if not retry:
                _settle(task, *_outcome(task, inner))
        self._dispatch()

    def _watch(self) -> None:
        """Abandon tasks long past their deadline that pebble has not reported."""
        while True:
            time.sleep(1.0)
            now = time.monotonic()
            with self._lock:
                late = {task: w for task, w in self._running.items() if task.deadline < now}
                for task in late:
                    del self._running[task]
            for task, worker in late.items():
                _end(worker)
                _settle(task, WorkerError(f"took longer than {task.limits.wall_seconds:g} s"))
            if late:
                self._dispatch()


def _new_worker() -> pebble.ProcessPool:
    context: Any = _CleanContext()  # its locks are loky's, not those that pebble declares
    return pebble.ProcessPool(1, initializer=_initialize, context=context)


def _end(worker: pebble.ProcessPool, *, wait: bool = False) -> None:
    """Kill a worker process. With `wait`, wait at most 5 s until it has ended."""

    def join(timeout: float | None = None) -> None:
        with contextlib.suppress(Exception):
            worker.join(timeout)

    worker.stop()
    thread = threading.Thread(target=join, name="ending worker", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # since Python 3.12 no thread can be started at interpreter shutdown
        join(_START_TIMEOUT)
        return
    if wait:
        thread.join(_START_TIMEOUT)


def _outcome(task: _Task, inner: concurrent.futures.Future) -> tuple[Any, BaseException | None]:
    """Return (result, error) of a task from pebble's future."""
    try:
        result, error = inner.result()
        return (result, None) if error is None else (None, error)
    except concurrent.futures.TimeoutError:
        return None, WorkerError(f"took longer than {task.limits.wall_seconds:g} s")
    except concurrent.futures.CancelledError:
        return None, WorkerError("the task was cancelled")
    except pebble.ProcessExpired as expired:
        return None, _exit_error(expired.exitcode, task.limits)
    except BaseException as error:
        return None, WorkerError(f"the worker failed ({type(error).__name__}: {error})")


def _settle(task: _Task, result: Any, error: BaseException | None = None) -> None:
    """Set a task's result or error on its future, unless the future was cancelled."""
    if isinstance(result, WorkerError):
        result, error = None, result
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled
        if error is None:
            task.future.set_result(result)
        else:
            task.future.set_exception(error)


def _out_of_cpu_time(inner: concurrent.futures.Future) -> bool:
    """Return whether a run ended because its process exceeded its CPU time."""
    error = None if inner.cancelled() else inner.exception()
    return isinstance(error, pebble.ProcessExpired) and error.exitcode in _CPU_TIME_CODES


def _exit_error(exit_code: int, limits: Limits) -> WorkerError:
    if exit_code in _CPU_TIME_CODES:
        return LimitError(f"used more than {limits.cpu_seconds:g} s of CPU time")
    return WorkerError(f"its process died (exit code {exit_code})")


class _CleanContext(LokyContext):
    """Context that starts processes by exec, without the main module and environment secrets."""

    def Process(self, *args, **keywords):
        process = super().Process(*args, **keywords)
        hidden = dict.fromkeys(os.environ.keys() - _ENVIRONMENT, "")
        process.env = hidden | _ONE_THREAD
        return process


# The code below runs in the workers.


def _initialize() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler must wait for C code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limited(function: Callable[..., Any], args: tuple, limits: Limits) -> tuple[Any, Any]:
    """Call a function within limits. Return (result, None) or (None, error)."""
    try:
        with _resource_limits(limits):
            return function(*args), None
    except MemoryError:
        return None, LimitError(f"used more than {limits.memory_bytes >> 20} MiB")
    except Exception as error:
        try:  # an exception that cannot be unpickled would break the pool's pipe
            pickle.loads(pickle.dumps(error))
            return None, error
        except Exception:
            return None, WorkerError(traceback.format_exception_only(error)[-1].strip()[:500])
    except BaseException as error:  # such as SystemExit
        return None, WorkerError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _resource_limits(limits: Limits):
    """Limit the CPU time and memory of this process in the block.

    The limits are lifted before the result is sent, because a process killed while writing to the
    pool's pipe would break the pipe.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = math.ceil(used.ru_utime + used.ru_stime + limits.cpu_seconds) + 1
    previous = {}
    for kind, soft in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, _address_space(limits))):
        previous[kind] = _, hard = resource.getrlimit(kind)
        with contextlib.suppress(ValueError, OSError):  # a system without this limit
            resource.setrlimit(kind, (soft, hard))
    # RLIMIT_CPU counts whole seconds. The timer's signal ends the process even within C code.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind, values in previous.items():
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, values)


def _address_space(limits: Limits) -> int:
    """Return the limit on the address space of this process, in bytes."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return resource.RLIM_INFINITY
    return used + limits.memory_bytes


_POOL = _Pool(max(2, min(16, os.cpu_count() or 2)))
atexit.register(close)
