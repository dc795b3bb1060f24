"""The key-value store of JAX's coordination service, and what this process knows of the others.

`processes` exchanges facts through it, and `process_watch` finds out which processes have failed.
"""

import contextlib
import dataclasses
import threading
import time
from typing import Any

_PREFIX = "mmsr1"


@dataclasses.dataclass
class State:
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
      notices: Notices of any process that have come here, see `processes.notify`.
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
    notices: set[str] = dataclasses.field(default_factory=set)


state = State()


def set_value(key: str, value: str, overwrite: bool = False) -> None:
    state.client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=overwrite)


def get_value(key: str, deadline: float) -> str | None:
    """Return a value once it is there; None if it is not in time, or the server is gone."""
    milliseconds = max(1, int(1000 * (deadline - time.monotonic())))
    try:
        return state.client.blocking_key_value_get(f"{_PREFIX}/{key}", milliseconds)
    except RuntimeError:  # of JAX
        return None


def try_get(key: str) -> str | None:
    """Return a value, or None if it is not there. Raises RuntimeError if the server is gone."""
    try:
        return state.client.key_value_try_get(f"{_PREFIX}/{key}")
    except RuntimeError as error:  # of JAX
        if "NOT_FOUND" in str(error):
            return None
        raise


def values_under(folder: str) -> dict[str, str]:
    """Return the values of the keys in a folder, by the rest of the key."""
    prefix = f"{_PREFIX}/{folder}/"
    return {
        key.removeprefix(prefix): value for key, value in state.client.key_value_dir_get(prefix)
    }


def delete(key: str) -> None:
    """Delete a value, or the folder of this name."""
    state.client.key_value_delete(f"{_PREFIX}/{key}")


def phase_of(process: int) -> str:
    """Return what a process is doing, as far as it has said."""
    with contextlib.suppress(RuntimeError):
        return try_get(f"phase/{process}") or "start"
    return "unknown"
