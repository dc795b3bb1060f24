"""The first few that work: tried in parallel, each failure replaced by the next in line."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from mmsr1_jax.tools.web import WebError

T = TypeVar("T")
R = TypeVar("R")


async def first_that_work(
    items: Sequence[T], count: int, work: Callable[[T], Awaitable[R]], *, until: float | None = None
) -> tuple[list[R], list[str]]:
    """Results of the first `count` items whose `work` raises nothing, or of fewer.

    Args:
      until: on the monotonic clock: what is not there by then is left out; None: no limit.

    Returns:
      the results in the order of the items, and why others failed, by their number from 1.
    """
    waiting = iter(enumerate(items))
    running: dict[asyncio.Task, int] = {}
    found: dict[int, R] = {}
    errors: dict[int, str] = {}

    def start(more: int) -> None:
        for _, (number, item) in zip(range(more), waiting, strict=False):
            running[asyncio.ensure_future(work(item))] = number

    start(count)
    try:
        while running:
            left = None if until is None else max(0.0, until - time.monotonic())
            done, _ = await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                errors |= {number: f"{number + 1}: too slow" for number in running.values()}
                break
            for task in done:
                number = running.pop(task)
                try:
                    found[number] = task.result()
                except WebError as error:
                    errors[number] = f"{number + 1}: {error}"
                    start(1)
                except Exception as error:  # a page that nobody has thought of
                    errors[number] = f"{number + 1}: {type(error).__name__}"
                    start(1)
    finally:
        for task in running:
            task.cancel()
    return [found[n] for n in sorted(found)], [errors[n] for n in sorted(errors)]
