"""The processes of a command that runs on several hosts: their start, exchange and end.

    start(..)                     before anything touches a device
    exchange("lengths", values)   the values of all processes, by index
    agree("step", value, ..)      refused unless all have the same
    main()                        whether this is process 0, which writes the files

Facts are exchanged as JSON over JAX's coordination service, whose server is in process 0, never by
collectives of devices: a host may wait for tools as long as it likes, and a limit names those that
do not answer. With one process all of this does nothing.

A process that fails says so, and all others end with its message. One that dies or is silent for
`heartbeat_seconds` is named by process 0, or by all if it is process 0. One that hangs while others
wait in a collective is found by their `watchdog`.
"""

import collections
import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils.logs import log

Result = TypeVar("Result")

_PREFIX = "mmsr1"
_BEAT_SECONDS = 1.0
_END_SECONDS = 86400.0  # while process 0 completes files alone
_ACKNOWLEDGE_SECONDS = 5.0  # for which process 0 keeps the server running after a failure
_LOST = ("gloo", "nccl", "connection", "unavailable", "heartbeat", "coordination", "socket")


class ProcessError(UserError):
    """Another process failed, does not answer, or has other settings; the message names it."""


@dataclasses.dataclass
class _State:
    """State of this process.

    Attributes:
      client: Client of the coordination service; None: there is one process.
      index, count: Index of this process, and number of processes.
      timeout: Seconds for which `exchange` waits.
      sequence: Number of exchanges so far, by topic.
      heartbeat_seconds: Seconds of silence after which a process counts as dead.
      answered: When the server answered last.
      ended: Set when the command has ended, so that silence is no failure.
      threads: Threads that watch the others.
    """

    client: Any = None
    index: int = 0
    count: int = 1
    timeout: float = 1800.0
    sequence: dict[str, int] = dataclasses.field(default_factory=dict)
    heartbeat_seconds: float = 30.0
    answered: float = 0.0
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    threads: list[threading.Thread] = dataclasses.field(default_factory=list)


_state = _State()


def start(
    *,
    coordinator: str | None,
    count: int | None,
    index: int | None,
    start_seconds: float,
    timeout: float,
    heartbeat_seconds: float,
) -> None:
    """Join the processes of a run; does nothing if it has one.

    Must be called before anything touches a device. Without arguments the launcher is detected: a
    TPU slice of several hosts, SLURM, MPI.

    Args:
      coordinator: HOST:PORT of process 0.
      count, index: Number of processes, and index of this one.
      start_seconds: Seconds for which the processes wait for each other at the start.
      timeout: Seconds for which they wait later.
      heartbeat_seconds: Seconds of silence after which a process counts as dead.

    Raises:
      UserError: The arguments are incomplete, or the processes did not all start in time.
    """
    if coordinator is None and count is None and index is None:
        coordinator, count, index = _detect(start_seconds)
        if coordinator is None:
            return
    if coordinator is None or count is None or index is None:
        raise UserError("give all of --coordinator, --num_processes and --process_id, or none")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be in [0, {count}), as --num_processes={count}")
    if count == 1:
        return
    import jax  # not above, as commands that need no device start without it

    # JAX would handle SIGTERM itself, and so hide it from the commands.
    jax.config.update("jax_enable_preemption_service", False)
    if index:
        _wait_for_coordinator(coordinator, start_seconds)
    try:
        jax.distributed.initialize(
            coordinator, count, index, cluster_detection_method="deactivate",
            initialization_timeout=int(start_seconds),
            heartbeat_timeout_seconds=int(2 * heartbeat_seconds), shutdown_timeout_seconds=60,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes did not all start: {reason}. Does every host run the same command?"
        ) from None
    _join(timeout, heartbeat_seconds)


def _wait_for_coordinator(address: str, seconds: float) -> None:
    """Wait until process 0 listens, since JAX aborts the process if it does not in time."""
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + seconds, "no address"
    while host and port.isdecimal() and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            reason = str(error)
            time.sleep(0.5)
    raise UserError(
        f"--coordinator={address}: no answer in {seconds:.0f} s ({reason}). It must be HOST:PORT "
        "of process 0, which runs the same command, with the port open"
    )


def _detect(seconds: float) -> tuple[str | None, int | None, int | None]:
    """Return coordinator, number and index of the processes by the launcher, or None.

    JAX knows TPU slices, SLURM, Open MPI and Kubernetes. It would give each process of a node one
    of its GPUs; here each process takes all.
    """
    from jax._src.clusters import ClusterEnv  # JAX has no public access to what it detects

    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, [], None, int(seconds)
    )
    coordinator, count, index = found[:3]
    if coordinator is None or count is None or index is None:
        return None, None, None
    return coordinator, count, index


def _join(timeout: float, heartbeat_seconds: float) -> None:
    from jax._src import distributed  # JAX has no public access to the key-value store

    state = distributed.global_state
    if state.client is None or (state.num_processes or 1) == 1:
        return
    _state.client, _state.timeout = state.client, timeout
    _state.index, _state.count = state.process_id or 0, state.num_processes or 1
    _state.heartbeat_seconds, _state.answered = heartbeat_seconds, time.monotonic()
    for target in (_watch, _watch_server):
        thread = threading.Thread(target=target, args=(heartbeat_seconds,), daemon=True)
        thread.start()
        _state.threads.append(thread)
    log.info("process %d of %d", _state.index, _state.count)


def index() -> int:
    """Return the index of this process, from 0."""
    return _state.index


def count() -> int:
    """Return the number of processes."""
    return _state.count


def main() -> bool:
    """Return whether this is process 0, which writes the files of a run."""
    return _state.index == 0


def exchange(topic: str, value: Any, timeout: float | None = None) -> list[Any]:
    """Return the values of all processes, by index. All processes must call it.

    Args:
      topic: What is exchanged. The calls of a topic are counted, and belong together by their
        number; a topic must not be exchanged in several threads at once.
      value: Value of this process, which JSON can hold.
      timeout: Seconds to wait for the others; None: that of `start`.

    Raises:
      ProcessError: Processes did not answer in time; the message names them.
    """
    if _state.client is None:
        return [value]
    timeout = _state.timeout if timeout is None else timeout
    number = _state.sequence.get(topic, 0)
    _state.sequence[topic] = number + 1
    key = f"exchange/{topic.replace(' ', '_')}"
    _set(f"{key}/{number}/{_state.index}", json.dumps(value))
    deadline, values = time.monotonic() + timeout, []
    for process in range(_state.count):
        text = _get(f"{key}/{number}/{process}", deadline)
        if text is None:
            raise ProcessError(_missing(topic, f"{key}/{number}", timeout))
        values.append(json.loads(text))
    if number:  # all have read the last ones, or they would not be here
        _state.client.key_value_delete(f"{_PREFIX}/{key}/{number - 1}/{_state.index}")
    return values


def broadcast(topic: str, value: Any) -> Any:
    """Return the value of process 0."""
    return exchange(topic, value if main() else None)[0]


def barrier(topic: str, timeout: float | None = None) -> None:
    """Wait until all processes are here; `timeout` as in `exchange`."""
    exchange(topic, None, timeout)


def call_together(topic: str, function: Callable[[], Result], refused: type[Exception]) -> Result:
    """Call a function in all processes. What one raises of type `refused`, all raise."""
    error, result = None, None
    try:
        result = function()
    except refused as caught:
        error = caught
    messages = exchange(topic, None if error is None else str(error))
    if error is not None:
        raise error
    for message in filter(None, messages):
        raise refused(message)
    return cast(Result, result)


def sum_counts(topic: str, counts: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of counts over all processes, by name."""
    total = collections.Counter[str]()
    for part in exchange(topic, dict(counts)):
        total.update(part)
    return {name: float(total[name]) for name in sorted(total)}


def agree(facts: Mapping[str, Any]) -> None:
    """Check that facts are the same in all processes.

    Raises:
      ProcessError: They are not; the message names the first process and fact that differ.
    """
    first, *others = exchange("facts", dict(facts))
    for process, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise ProcessError(
                    f"process {process}: {name} is {_short(theirs.get(name))}, and in process 0 "
                    f"{_short(value)}; all processes must run the same command on the same files"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}.."


def phase(name: str) -> None:
    """Say what this process is doing, for the messages of others that wait for it."""
    if _state.client is not None:
        _set(f"phase/{_state.index}", name, overwrite=True)


@contextlib.contextmanager
def watchdog(name: str, seconds: float) -> Iterator[None]:
    """End all processes if the block, which runs collectives, takes longer than `seconds`.

    Processes that are not in a block of this name are named as those that the others wait for.
    """
    if _state.client is None:
        yield
        return
    phase(name)

    def expire() -> None:
        phases = {p: _phase_of(p) for p in range(_state.count)}
        absent = [f"process {p} is in {other}" for p, other in phases.items() if other != name]
        fail(f"{name} takes longer than {seconds:.0f} s: {', '.join(absent) or 'all are in it'}")

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        phase(f"after {name}")


def fail(message: str) -> None:
    """Tell all processes why this one ends, and end it with exit code 1. Does not return.

    Nothing is waited for but, in process 0, that the others have read the message.
    """
    _end_soon()
    announced = f"process {_state.index}: {message}"
    with contextlib.suppress(Exception):
        _set("failure", announced)  # fails if another was first
    with contextlib.suppress(Exception):
        announced = _try_get("failure") or announced
    _end(announced)


def guard_failure(error: BaseException) -> None:
    """Announce the exception that ends this process; with several, does not return.

    An exception of a collective has another cause, the process that is gone: it is waited for until
    that is found, or for as long as a silent process may take.
    """
    if _state.client is None:
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
        time.sleep(_state.heartbeat_seconds + 3 * _BEAT_SECONDS)  # `_watch` ends this process
    fail(message)


def finish() -> None:
    """End as planned: wait for the others, and stop watching them."""
    if _state.client is None:
        return
    barrier("end", timeout=_END_SECONDS)
    _state.ended.set()
    for thread in _state.threads:  # they must not be in a call when the interpreter ends
        thread.join(_ACKNOWLEDGE_SECONDS)
    import jax

    jax.distributed.shutdown()  # waits for the others, so that the server of process 0 is the last


# Threads


def _watch(heartbeat_seconds: float) -> None:
    """Send heartbeats, and end this process when another one has failed.

    In process 0 also look for processes that send no heartbeats.
    """
    heard = dict[int, tuple[str, float]]()  # last heartbeat of each process, and when it came
    number = 0
    while not _state.ended.wait(_BEAT_SECONDS):
        number += 1
        try:
            _set(f"alive/{_state.index}", str(number), overwrite=True)
            failure = _try_get("failure")
            beats = dict(_state.client.key_value_dir_get(f"{_PREFIX}/alive/")) if main() else {}
        except RuntimeError:  # of JAX: the server does not answer, which `_watch_server` notices
            continue
        _state.answered = time.monotonic()
        if failure is not None:
            _end(failure)
        for process in range(_state.count) if main() else ():
            beat, now = beats.get(f"{_PREFIX}/alive/{process}", ""), time.monotonic()
            if process not in heard or beat != heard[process][0]:
                heard[process] = beat, now
            elif now - heard[process][1] > heartbeat_seconds:
                fail(
                    f"process {process} has been silent for {heartbeat_seconds:.0f} s: it is dead, "
                    "stopped, or cut off"
                )


def _watch_server(heartbeat_seconds: float) -> None:
    """End this process when process 0 does not answer."""
    while not _state.ended.wait(_BEAT_SECONDS):
        if time.monotonic() - _state.answered > heartbeat_seconds:
            _end("process 0, which coordinates, does not answer: it has ended, or is cut off")


_ending = threading.Lock()


def _end_soon() -> None:
    """End this process in a few seconds, whatever the calls to a server that is gone do."""
    timer = threading.Timer(2 * _ACKNOWLEDGE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end(message: str) -> None:
    """End this process at once, with exit code 1 and the message of the failure."""
    _end_soon()
    _ending.acquire()  # never released: the first message is the one
    with contextlib.suppress(Exception):
        print(f"error: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        _set(f"acknowledged/{_state.index}", "1", overwrite=True)
        if main():  # the server ends with it
            deadline = time.monotonic() + _ACKNOWLEDGE_SECONDS
            while time.monotonic() < deadline:
                if len(_state.client.key_value_dir_get(f"{_PREFIX}/acknowledged/")) >= _state.count:
                    time.sleep(0.2)  # in which the last one ends
                    break
                time.sleep(0.1)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(1)


# The key-value store


def _set(key: str, value: str, overwrite: bool = False) -> None:
    _state.client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=overwrite)


def _get(key: str, deadline: float) -> str | None:
    """Return a value once it is there; None if it is not in time, or the server is gone."""
    milliseconds = max(1, int(1000 * (deadline - time.monotonic())))
    try:
        return _state.client.blocking_key_value_get(f"{_PREFIX}/{key}", milliseconds)
    except RuntimeError:  # of JAX
        return None


def _try_get(key: str) -> str | None:
    """Return a value, or None if it is not there. Raises RuntimeError if the server is gone."""
    try:
        return _state.client.key_value_try_get(f"{_PREFIX}/{key}")
    except RuntimeError as error:  # of JAX
        if "NOT_FOUND" in str(error):
            return None
        raise


def _phase_of(process: int) -> str:
    with contextlib.suppress(RuntimeError):
        return _try_get(f"phase/{process}") or "start"
    return "unknown"


def _missing(topic: str, key: str, timeout: float) -> str:
    """Return the message that names the processes that have not exchanged `topic`."""
    missing = []
    with contextlib.suppress(RuntimeError):
        missing = [p for p in range(_state.count) if _try_get(f"{key}/{p}") is None]
    phases = [f"process {p} (in {_phase_of(p)})" for p in missing]
    return f"{topic}: no answer in {timeout:.0f} s from {', '.join(phases) or 'process 0'}"
