"""The first few that work: tried in parallel, each failure replaced by the next in line."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from mmsr1_jax.tools.web import WebError

T = TypeVar("T")
R = TypeVar("R")


async def first_that_work(
    items: Sequence[T], count: int, work: Callable[[T], Awaitable[R]]
) -> tuple[list[R], list[str]]:
    """Results of the first `count` items whose `work` raises no WebError, or of fewer.

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
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = running.pop(task)
                try:
                    found[number] = task.result()
                except WebError as error:
                    errors[number] = f"{number + 1}: {error}"
                    start(1)
    finally:
        for task in running:
            task.cancel()
    return [found[n] for n in sorted(found)], [errors[n] for n in sorted(errors)]
