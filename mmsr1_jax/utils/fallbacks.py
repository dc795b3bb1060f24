"""Counters for degraded operation: every fallback is counted, and logged the first time.

    fallbacks.count("cache/failed", "cache: disk is full; searches continue without it")
    fallbacks.take_counts()    # {"cache/failed": 17}: metrics of a step

Counts are per process. All functions are thread-safe.
"""

import collections
import threading

from mmsr1_jax.utils.logs import log

_lock = threading.Lock()
_counts: collections.Counter[str] = collections.Counter()
_logged: set[str] = set()


def count(name: str, message: str = "") -> None:
    """Count a fallback.

    Args:
      name: Name of the metric, such as `service/serper/refused`.
      message: Warning, logged the first time that this process counts the name. If empty, nothing
        is logged.
    """
    with _lock:
        _counts[name] += 1
    if message:
        warn_once(name, message)


def warn_once(name: str, message: str) -> None:
    """Log a warning the first time that this process calls this for a name, without counting it."""
    with _lock:
        first = name not in _logged
        _logged.add(name)
    if first:
        log.warning("%s", message)


def take_counts() -> dict[str, float]:
    """Return the nonzero counts by name since the last call, and reset them."""
    with _lock:
        counts = {name: float(value) for name, value in sorted(_counts.items())}
        _counts.clear()
    return counts
