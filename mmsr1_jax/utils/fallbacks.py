"""Counters for degraded operation: every fallback is counted, and logged the first time.

    fallbacks.note("cache/failed", "cache: disk is full; searches continue without it")
    fallbacks.take()    # {"cache/failed": 17}: metrics of a step

EngineStats are per process. All functions are thread-safe.
"""

import collections
import sys
import threading

_lock = threading.Lock()
_counts: collections.Counter[str] = collections.Counter()
_logged: set[str] = set()


def note(name: str, words: str = "") -> None:
    """Count a fallback.

    Args:
      name: Name of the metric, such as `service/serper/refused`.
      words: Log line, printed the first time that this process counts the name. If empty, nothing
        is printed.
    """
    with _lock:
        _counts[name] += 1
    if words:
        say(name, words)


def say(name: str, words: str) -> None:
    """Print a line the first time that this process calls this for a name, without counting it."""
    with _lock:
        first = name not in _logged
        _logged.add(name)
    if first:
        print(words, file=sys.stderr)


def take() -> dict[str, float]:
    """Return the nonzero counts by name since the last call, and reset them."""
    with _lock:
        taken = {name: float(count) for name, count in sorted(_counts.items())}
        _counts.clear()
    return taken
