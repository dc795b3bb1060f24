"""How the time of a function grows with its input."""

import time
from collections.abc import Callable

ATTEMPTS = 6  # other programs can only make a function look slower
TIMES = 15  # as long, at most, for ten times the input
LEAST = 2e-4  # seconds; below that a measurement is rounding


def cpu_seconds(function: Callable[[], object], *, runs: int = 2) -> float:
    """Return the least processor time that a call took on this thread."""
    taken = []
    for _ in range(runs):
        begin = time.thread_time()
        function()
        taken.append(time.thread_time() - begin)
    return min(taken)


def assert_linear(function: Callable[[int], object], length: int, *, slack: float = 0.0) -> None:
    """Assert that ten times the input takes at most fifteen times as long.

    Args:
      function: Makes a call whose input has this length; it is made before the time is taken.
      length: Of the shorter input.
      slack: Seconds that the longer one may take beyond.
    """
    for _ in range(ATTEMPTS):
        short, long = function(length), function(10 * length)
        least = max(cpu_seconds(short), LEAST)
        taken = cpu_seconds(long)
        if taken <= TIMES * least + slack:
            return
    raise AssertionError(f"{length}: {least:.4f} s, {10 * length}: {taken:.4f} s")
