"""Text search: find pages, read them, and put what they say for the question into a few sentences.

query ──► hits ──► page, page, page, ..   in parallel; one that fails gives way to the next hit
                      │
                      ├─ a summariser: at most five sentences
                      └─ without one: the paragraphs that are most about the question
"""

import json
import time
from typing import Protocol

from mmsr1_jax.tools.cached_tool import Stored
from mmsr1_jax.tools.first_completed import first_that_work
from mmsr1_jax.tools.page_checks import nothing_said
from mmsr1_jax.tools.passages import best_passages
from mmsr1_jax.tools.services import Hit, has_text
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.tool import Observation, Query, Result, text_result
from mmsr1_jax.tools.web import BodyError, WebError
from mmsr1_jax.utils import workers

_LONG = 20_000  # characters


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
    seconds: after which it makes do with the pages that are there; None: it waits for all.
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
        seconds: float | None = None,
    ):
        self._seconds = seconds
        self._finder, self._reader, self._summariser = finder, reader, summariser
        self._results, self._spare, self._chars = results, spare, chars

    async def __call__(self, query: Query) -> Observation:
        if query.text is None:
            return Observation(status="failed", error="searches by text only")
        until = None if self._seconds is None else time.monotonic() + self._seconds
        try:
            hits = await self._finder.search(query.text, self._results + self._spare)
        except WebError as error:
            return Observation(status="failed", error=f"search: {error}")
        if not hits:
            return Observation(status="empty")

        def read(hit: Hit):
            return self._result(hit, query.question)

        results, errors = await first_that_work(hits, self._results, read, until=until)
        if not results:
            return Observation(status="failed", error=f"no page could be read: page {errors[0]}")
        return Observation(
            results=results, error="; ".join(f"page {error}" for error in errors) or None
        )

    async def _result(self, hit: Hit, question: str) -> Result:
        """Raises WebError where the page cannot be read or summarised."""
        if self._reader is None or not hit.link:
            text = hit.snippet if has_text(hit.snippet) else hit.title
            if not has_text(text):
                raise BodyError("no snippet")
        else:
            page = await self._reader.read(hit.link)
            if why := nothing_said(page):
                raise BodyError(why)
            if self._summariser is None:
                text = await _passages(page, question, self._chars)
            else:
                text = await self._summariser.summarise(page, question)
        return text_result(hit.link or hit.title, text)


async def _passages(page: str, question: str, chars: int) -> str:
    """Return `best_passages`, computed in a worker if that takes longer than handing it over.

    Raises:
      BodyError: The worker exceeded a limit.
    """
    if len(page) < _LONG:
        return best_passages(page, question, chars)
    try:
        return await workers.run_async(best_passages, page, question, chars)
    except workers.WorkerError as error:
        raise BodyError(f"choosing its passages {error}") from None


class PassageSearch:
    """Search in an index that holds passages: nothing has to be read.

    Args of the constructor:
      retrieval: finds (title, text) of passages.
      stored: what was found before.
      name: of the index; others find other passages.
      results: passages of an observation, at most.
    """

    def __init__(self, retrieval: Retrieval, stored: Stored, name: str, *, results: int = 5):
        self._retrieval, self._stored = retrieval, stored
        self._name, self._results = name, results

    async def __call__(self, query: Query) -> Observation:
        if query.text is None:
            return Observation(status="failed", error="searches by text only")
        key = json.dumps([self._name, query.text, self._results])
        try:
            found = await self._stored.get(
                "passages", key, lambda: self._retrieval.passages(query.text, self._results)
            )
        except WebError as error:
            return Observation(status="failed", error=f"search: {error}")
        results = [text_result(title, text) for title, text in found[: self._results]]
        return Observation(status="ok" if results else "empty", results=results)
