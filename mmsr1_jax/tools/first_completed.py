"""Parallel execution with fallbacks: each item that fails is replaced by the next one."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from mmsr1_jax.tools.web import WebError

T = TypeVar("T")
R = TypeVar("R")


async def first_successful(
    items: Sequence[T],
    count: int,
    work: Callable[[T], Awaitable[R]],
    *,
    deadline: float | None = None,
) -> tuple[list[R], list[str]]:
    """Return the results of up to `count` items for which `work` succeeds.

    `count` items run in parallel. Each one that fails is replaced by the next item.

    Args:
      items: Items in order of preference.
      count: Maximum number of results.
      work: Async function that processes an item.
      deadline: Time on the monotonic clock after which pending items are dropped. None means no
        deadline.

    Returns:
      The results in the order of the items, and one message per failed or late item, which begins
      with the item's number, counted from 1.
    """
    pending = iter(enumerate(items))
    running: dict[asyncio.Task, int] = {}
    results: dict[int, R] = {}
    errors: dict[int, str] = {}

    def start(count: int) -> None:
        for _, (index, item) in zip(range(count), pending, strict=False):
            running[asyncio.ensure_future(work(item))] = index

    start(count)
    try:
        while running:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = await asyncio.wait(
                running, timeout=remaining, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                errors |= {index: f"{index + 1}: too slow" for index in running.values()}
                break
            for task in done:
                index = running.pop(task)
                try:
                    results[index] = task.result()
                except WebError as error:
                    errors[index] = f"{index + 1}: {error}"
                    start(1)
                except Exception as error:  # pages may break parsers in unforeseen ways
                    errors[index] = f"{index + 1}: {type(error).__name__}"
                    start(1)
    finally:
        for task in running:
            task.cancel()
    return [results[n] for n in sorted(results)], [errors[n] for n in sorted(errors)]
