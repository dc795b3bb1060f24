"""Count of compiled XLA programs, which must not grow after warm-up."""

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0
_lock = threading.Lock()


def count() -> int:
    """Return the number of programs compiled by this process since this module was imported."""
    return _count


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _count
    with _lock:  # each engine compiles in its own thread
        _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)
