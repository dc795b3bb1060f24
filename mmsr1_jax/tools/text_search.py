"""Text search: find pages, read them, and summarise them for the question.

query ──► hits ──► page, page, page, ..   in parallel; if one fails, the next hit replaces it
                      │
                      ├─ with a summariser: at most five sentences
                      └─ without one: the paragraphs most relevant to the question
"""

import json
import time
from typing import Protocol

from mmsr1_jax.tools.cached_tool import CachedCalls
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
    """Text search tool.

    Args:
      finder: Client that finds pages.
      reader: Client that reads pages. None uses the snippets of the hits instead.
      summariser: Client that summarises pages. None uses their most relevant paragraphs instead.
      results: Maximum number of pages in an observation.
      spare: Number of additional hits to request, as replacements for pages that fail.
      chars: Maximum number of characters of a page's paragraphs, without a summariser.
      seconds: Time after which the search returns the pages read so far. None waits for all.
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
        """Return the result for a hit. Raises WebError if its page cannot be read or summarised."""
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
    """Return `best_passages`, computed in a worker if that takes longer than sending it the page.

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
    """Text search tool on an index of passages, which need no page reader.

    Args:
      retrieval: Client that finds (title, text) of passages.
      stored: Cache of search results.
      name: Name of the index, part of the cache key because indexes hold different passages.
      results: Maximum number of passages in an observation.
    """

    def __init__(self, retrieval: Retrieval, stored: CachedCalls, name: str, *, results: int = 5):
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
