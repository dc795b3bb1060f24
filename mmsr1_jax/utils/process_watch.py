"""Failures of the processes of a command: how one is noticed, and how all end with its message.

Two threads watch: one sends heartbeats, reads what other processes have announced and, in process
0, looks for those that are silent; the other looks whether process 0 answers.
"""

import contextlib
import os
import sys
import threading
import time

from mmsr1_jax.config.errors import UserError, exit_code
from mmsr1_jax.utils.coordination import set_value, state, try_get, values_under

BEAT_SECONDS = 1.0
ACKNOWLEDGE_SECONDS = 5.0  # for which process 0 keeps the server running after a failure
_LOST = ("gloo", "nccl", "connection", "unavailable", "heartbeat", "coordination", "socket")


def start(heartbeat_seconds: float) -> None:
    """Start the threads that watch the other processes."""
    state.answered = time.monotonic()
    for target in (_watch, _watch_server):
        thread = threading.Thread(target=target, args=(heartbeat_seconds,), daemon=True)
        thread.start()
        state.threads.append(thread)


def fail(message: str, code: int = 1) -> None:
    """Tell all processes why this one ends, and end all with an exit code. Does not return.

    Nothing is waited for but, in process 0, that the others have read the message.
    """
    _end_soon()
    announced = f"{code} process {state.index}: {message}"
    with contextlib.suppress(Exception):
        set_value("failure", announced)  # fails if another was first
    with contextlib.suppress(Exception):
        announced = try_get("failure") or announced
    _end(announced)


def guard_failure(error: BaseException) -> None:
    """Announce the exception that ends this process; with several, does not return.

    An exception of a collective has another cause, the process that is gone: it is waited for until
    that is found, or for as long as a silent process may take.
    """
    if state.client is None:
        return
    import jax

    message = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in message.lower() for word in _LOST
    ):
        time.sleep(state.heartbeat_seconds + 3 * BEAT_SECONDS)  # `_watch` ends this process
    fail(message, exit_code(error))


def _watch(heartbeat_seconds: float) -> None:
    """Send heartbeats, and end this process when another one has failed.

    In process 0 also look for processes that send no heartbeats.
    """
    heard = dict[int, tuple[str, float]]()  # last heartbeat of each process, and when it came
    number = 0
    while not state.ended.wait(BEAT_SECONDS):
        number += 1
        try:
            set_value(f"alive/{state.index}", str(number), overwrite=True)
            failure = try_get("failure")
            beats = values_under("alive") if state.index == 0 else {}
            _share_notices()
        except RuntimeError:  # of JAX: the server does not answer, which `_watch_server` notices
            continue
        state.answered = time.monotonic()
        if failure is not None:
            _end(failure)
        for process in range(state.count) if state.index == 0 else ():
            beat, now = beats.get(str(process), ""), time.monotonic()
            if process not in heard or beat != heard[process][0]:
                heard[process] = beat, now
            elif now - heard[process][1] > heartbeat_seconds:
                fail(
                    f"process {process} has been silent for {heartbeat_seconds:.0f} s: it is dead, "
                    "stopped, or cut off"
                )


def _share_notices() -> None:
    """Publish the notices of this process, and read those of the others."""
    published = values_under("notices")
    for name in state.notices - published.keys():
        set_value(f"notices/{name}", "1", overwrite=True)
    state.notices |= published.keys()


def _watch_server(heartbeat_seconds: float) -> None:
    """End this process when process 0 does not answer."""
    while not state.ended.wait(BEAT_SECONDS):
        if time.monotonic() - state.answered > heartbeat_seconds:
            _end("1 process 0, which coordinates, does not answer: it has ended, or is cut off")


_ending = threading.Lock()


def _end_soon() -> None:
    """End this process in a few seconds, whatever the calls to a server that is gone do."""
    timer = threading.Timer(2 * ACKNOWLEDGE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end(announced: str) -> None:
    """End this process at once, with the exit code and the message of the failure."""
    _end_soon()
    code, _, message = announced.partition(" ")
    _ending.acquire()  # never released: the first message is the one
    with contextlib.suppress(Exception):
        print(f"error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        set_value(f"acknowledged/{state.index}", "1", overwrite=True)
        if state.index == 0:  # the server ends with it
            deadline = time.monotonic() + ACKNOWLEDGE_SECONDS
            while time.monotonic() < deadline:
                if len(values_under("acknowledged")) >= state.count:
                    time.sleep(0.2)  # in which the last one ends
                    break
                time.sleep(0.1)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(int(code))
