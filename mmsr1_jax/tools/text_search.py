"""Text search: find pages, read them, and put what they say for the question into a few sentences.

query ──► hits ──► page, page, page, ..   in parallel; one that fails gives way to the next hit
                      │
                      ├─ a summariser: at most five sentences
                      └─ without one: the paragraphs that are most about the question
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from mmsr1_jax.tools.passages import best_passages
from mmsr1_jax.tools.services import Hit
from mmsr1_jax.tools.tool import Observation, Query, Result, text_result
from mmsr1_jax.tools.web import WebError


class Finder(Protocol):
    async def search(self, query: str, count: int) -> list[Hit]: ...


class PageReader(Protocol):
    async def read(self, url: str) -> str: ...


class PageSummariser(Protocol):
    async def summarise(self, page: str, question: str) -> str: ...


class TextSearch:
    """Args of the constructor:
    finder: finds pages.
    reader: reads them; None: their snippets have to do.
    summariser: see above; None: paragraphs.
    results: pages of an observation, at most.
    spare: hits beyond those that are asked for, to take the place of pages that fail.
    chars: of a page's paragraphs, where nothing summarises them.
    """

    def __init__(
        self,
        finder: Finder,
        reader: PageReader | None = None,
        summariser: PageSummariser | None = None,
        *,
        results: int = 5,
        spare: int = 5,
        chars: int = 1500,
    ):
        self._finder, self._reader, self._summariser = finder, reader, summariser
        self._results, self._spare, self._chars = results, spare, chars

    async def __call__(self, query: Query) -> Observation:
        if query.text is None:
            return Observation(status="failed", error="searches by text only")
        try:
            hits = await self._finder.search(query.text, self._results + self._spare)
        except WebError as error:
            return Observation(status="failed", error=f"search: {error}")
        if not hits:
            return Observation(status="empty")
        results, errors = await self._read_all(hits, query.question)
        if not results:
            return Observation(status="failed", error=f"no page could be read: {errors[0]}")
        return Observation(results=results, error="; ".join(errors) or None)

    async def _read_all(self, hits: Sequence[Hit], question: str) -> tuple[list[Result], list[str]]:
        """The first pages that can be read, in the order of the hits, and why others could not."""
        waiting = iter(enumerate(hits))
        running: dict[asyncio.Task, int] = {}
        found: dict[int, Result] = {}
        errors: dict[int, str] = {}

        def start(count: int) -> None:
            for _, (number, hit) in zip(range(count), waiting, strict=False):
                running[asyncio.ensure_future(self._result(hit, question))] = number

        start(self._results)
        try:
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = running.pop(task)
                    try:
                        found[number] = task.result()
                    except WebError as error:
                        errors[number] = f"page {number + 1}: {error}"
                        start(1)
        finally:
            for task in running:
                task.cancel()
        return [found[n] for n in sorted(found)], [errors[n] for n in sorted(errors)]

    async def _result(self, hit: Hit, question: str) -> Result:
        """Raises WebError where the page cannot be read or summarised."""
        if self._reader is None:
            text = hit.snippet or hit.title
        else:
            page = await self._reader.read(hit.link)
            if not page.strip():
                raise WebError("no text in it")
            if self._summariser is None:
                text = await asyncio.to_thread(best_passages, page, question, self._chars)
            else:
                text = await self._summariser.summarise(page, question)
        return text_result(hit.link, text)
