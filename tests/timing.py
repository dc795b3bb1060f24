"""Assertions on how the running time of a function grows with its input."""

import gc
import time
from collections.abc import Callable

ATTEMPTS = 6  # other programs can only make a function look slower
MAX_RATIO = 15  # of the times of two inputs, one of them ten times as long
MIN_SECONDS = 2e-4  # measurements below are rounded up to this


def cpu_seconds(function: Callable[[], object], *, runs: int = 2) -> float:
    """Return the shortest CPU time of a call on this thread, without garbage collection."""
    times = []
    collects = gc.isenabled()
    gc.disable()  # a collection takes as long as all objects of the process require
    try:
        for _ in range(runs):
            start = time.thread_time()
            function()
            times.append(time.thread_time() - start)
    finally:
        if collects:
            gc.enable()
    return min(times)


def assert_linear(function: Callable[[int], object], length: int, *, slack: float = 0.0) -> None:
    """Assert that an input ten times as long takes at most fifteen times as long.

    Args:
      function: Returns the call to be timed, given the length of its input.
      length: Length of the shorter input.
      slack: Seconds by which the longer input may exceed the limit.
    """
    for _ in range(ATTEMPTS):
        short_call, long_call = function(length), function(10 * length)
        short = max(cpu_seconds(short_call), MIN_SECONDS)
        long = cpu_seconds(long_call)
        if long <= MAX_RATIO * short + slack:
            return
    raise AssertionError(f"{length}: {short:.4f} s, {10 * length}: {long:.4f} s")
