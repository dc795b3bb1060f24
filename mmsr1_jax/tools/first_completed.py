"""Parallel execution with fallbacks: each item that fails is replaced by the next one."""

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
    """Return the results of up to `count` items for which `work` succeeds.

    `count` items run in parallel. Each one that fails is replaced by the next item.

    Args:
      items: Items in order of preference.
      count: Number of results wanted.
      work: Async function that processes an item.
      until: Deadline on the monotonic clock, after which pending items are dropped. None means no
        deadline.

    Returns:
      The results in the order of the items, and one message per failed or late item, which begins
      with its number, counted from 1.
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
                except Exception as error:  # pages may break parsers in unforeseen ways
                    errors[number] = f"{number + 1}: {type(error).__name__}"
                    start(1)
    finally:
        for task in running:
            task.cancel()
    return [found[n] for n in sorted(found)], [errors[n] for n in sorted(errors)]
