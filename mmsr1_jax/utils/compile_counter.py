"""How many programs were compiled: after warm-up that number has to stay still (law 7)."""

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0
_lock = threading.Lock()


def count() -> int:
    """Programs that this process has compiled since this module was imported."""
    return _count


def _listen(event: str, duration: float, **_) -> None:
    global _count
    with _lock:  # engines compile in threads of their own
        _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)
