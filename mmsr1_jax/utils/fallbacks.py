"""Counters for degraded operation: every fallback is counted, and logged the first time.

    fallbacks.note("store/failed", "store: disk is full; searches continue without it")
    fallbacks.take()    {"store/failed": 17}: figures of a step

Counts are of this process. Any thread may call these functions.
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
      name: Name of the figure, such as `service/serper/refused`.
      words: Line for the log, printed the first time that this process counts the name; empty:
        nothing is printed.
    """
    with _lock:
        _counts[name] += 1
    if words:
        say(name, words)


def say(name: str, words: str) -> None:
    """Print a line the first time that this process calls this for the name; counts nothing."""
    with _lock:
        first = name not in _logged
        _logged.add(name)
    if first:
        print(words, file=sys.stderr)


def take() -> dict[str, float]:
    """Return the counts since the last call by name; names that were not counted are left out."""
    with _lock:
        taken = {name: float(count) for name, count in sorted(_counts.items())}
        _counts.clear()
    return taken
