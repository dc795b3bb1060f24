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
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import coordination, process_watch
from mmsr1_jax.utils.coordination import state
from mmsr1_jax.utils.logs import log
from mmsr1_jax.utils.process_watch import fail

Result = TypeVar("Result")

_PATIENCE_SECONDS = 10.0  # for which a process waits for process 0 without a message
_END_SECONDS = 86400.0  # while process 0 completes files alone


class ProcessError(UserError):
    """Another process failed or does not answer; the message names it."""

    exit_code = 1  # started again, it may answer


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
      UserError: The arguments are incomplete.
      ProcessError: The processes did not all start in time.
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
        raise ProcessError(
            f"the processes did not all start: {reason}. Does every host run the same command?"
        ) from None
    _join(timeout, heartbeat_seconds)


def _wait_for_coordinator(address: str, seconds: float) -> None:
    """Wait until process 0 listens, since JAX aborts the process if it does not in time."""
    host, _, port = address.rpartition(":")
    begin, reason, logged = time.monotonic(), "no address", False
    while host and port.isdecimal() and time.monotonic() - begin < seconds:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            reason = str(error)
            time.sleep(0.5)
        if time.monotonic() - begin > _PATIENCE_SECONDS and not logged:
            log.warning("waiting up to %.0f s for process 0 at %s: %s", seconds, address, reason)
            logged = True
    raise ProcessError(
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

    joined = distributed.global_state
    if joined.client is None or (joined.num_processes or 1) == 1:
        return
    state.client, state.timeout = joined.client, timeout
    state.index, state.count = joined.process_id or 0, joined.num_processes or 1
    state.heartbeat_seconds = heartbeat_seconds
    process_watch.start(heartbeat_seconds)
    log.info("process %d of %d", state.index, state.count)


def index() -> int:
    """Return the index of this process, from 0."""
    return state.index


def count() -> int:
    """Return the number of processes."""
    return state.count


def main() -> bool:
    """Return whether this is process 0, which writes the files of a run."""
    return state.index == 0


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
    if state.client is None:
        return [value]
    timeout = state.timeout if timeout is None else timeout
    number = state.sequence.get(topic, 0)
    state.sequence[topic] = number + 1
    key = f"exchange/{topic.replace(' ', '_')}"
    coordination.set_value(f"{key}/{number}/{state.index}", json.dumps(value))
    deadline, values = time.monotonic() + timeout, []
    for process in range(state.count):
        text = coordination.get_value(f"{key}/{number}/{process}", deadline)
        if text is None:
            raise ProcessError(_missing(topic, f"{key}/{number}", timeout))
        values.append(json.loads(text))
    if number:  # all have read the last ones, or they would not be here
        coordination.delete(f"{key}/{number - 1}/{state.index}")
    return values


def decide(topic: str, value: Any, rule: Callable[[list[Any]], Any]) -> Any:
    """Return what process 0 decides by a rule from the values of all, in fewer messages.

    Args:
      topic, value: As in `exchange`.
      rule: Returns the decision, which JSON can hold, from the values by index.

    Raises:
      ProcessError: Processes did not answer in time; the message names them.
    """
    if state.client is None:
        return rule([value])
    number = state.sequence.get(topic, 0)
    state.sequence[topic] = number + 1
    folder = f"decide/{topic.replace(' ', '_')}"
    key, deadline = f"{folder}/{number}", time.monotonic() + state.timeout
    if not main():
        coordination.set_value(f"{key}/{state.index}", json.dumps(value))
        text = coordination.get_value(f"{key}/0", deadline)
        if text is None:
            raise ProcessError(_missing(topic, key, state.timeout))
        return json.loads(text)
    values = [value]
    for process in range(1, state.count):
        text = coordination.get_value(f"{key}/{process}", deadline)
        if text is None:
            raise ProcessError(_missing(topic, key, state.timeout))
        values.append(json.loads(text))
    decision = rule(values)
    coordination.set_value(f"{key}/0", json.dumps(decision))
    if number:  # all have read the last decision, or they would not be here
        coordination.delete(f"{folder}/{number - 1}")
    return decision


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
      UserError: They are not; the message names the first process and fact that differ.
    """
    first, *others = exchange("facts", dict(facts))
    for process, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"process {process}: {name} is {_short(theirs.get(name))}, and in process 0 "
                    f"{_short(value)}; all processes must run the same command on the same files"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}.."


def notify(name: str) -> None:
    """Give all processes a notice, which they have about a second later; may be called anywhere."""
    if state.client is not None:
        state.notices.add(name)


def notified(name: str) -> bool:
    """Return whether any process has given a notice."""
    return name in state.notices


def phase(name: str) -> None:
    """Say what this process is doing, for the messages of others that wait for it."""
    if state.client is not None:
        coordination.set_value(f"phase/{state.index}", name, overwrite=True)


@contextlib.contextmanager
def watchdog(name: str, seconds: float) -> Iterator[None]:
    """End all processes if the block, which runs collectives, takes longer than `seconds`.

    Processes that are not in a block of this name are named as those that the others wait for.
    """
    if state.client is None:
        yield
        return
    phase(name)

    def expire() -> None:
        phases = {p: coordination.phase_of(p) for p in range(state.count)}
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


def finish() -> None:
    """End as planned: wait for the others, and stop watching them."""
    if state.client is None:
        return
    barrier("end", timeout=_END_SECONDS)
    state.ended.set()
    for thread in state.threads:  # they must not be in a call when the interpreter ends
        thread.join(process_watch.ACKNOWLEDGE_SECONDS)
    import jax

    jax.distributed.shutdown()  # waits for the others, so that the server of process 0 is the last


def _missing(topic: str, key: str, timeout: float) -> str:
    """Return the message that names the processes that have not exchanged `topic`."""
    missing = []
    with contextlib.suppress(RuntimeError):
        missing = [p for p in range(state.count) if coordination.try_get(f"{key}/{p}") is None]
    phases = [f"process {p} (in {coordination.phase_of(p)})" for p in missing]
    return f"{topic}: no answer in {timeout:.0f} s from {', '.join(phases) or 'process 0'}"
