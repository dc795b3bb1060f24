"""Text search: find pages, read them, and summarise them for the question.

query ──► hits ──► page, page, page, ..   in parallel; if one fails, the next hit replaces it
                      │
                      ├─ with a summariser: at most five sentences
                      └─ without one: the paragraphs most relevant to the question
"""

import json
import time

from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.first_completed import first_successful
from mmsr1_jax.tools.page_checks import missing_content
from mmsr1_jax.tools.passages import best_passages
from mmsr1_jax.tools.services import Finder, Hit, PageReader, PageSummariser, has_text
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.tool import Observation, Query, Result, text_result
from mmsr1_jax.tools.web import BodyError, WebError
from mmsr1_jax.utils import workers

_MIN_WORKER_CHARS = 20_000  # shorter pages are processed on the event loop


class TextSearch:
    """Text search tool.

    Args:
      finder: Client that finds pages.
      reader: Client that reads pages. None uses the snippets of the hits instead.
      summariser: Client that summarises pages. None uses their most relevant paragraphs instead.
      max_results: Maximum number of pages in an observation.
      num_spare: Number of additional hits to request, as replacements for pages that fail.
      max_chars: Maximum number of characters of a page's paragraphs, without a summariser.
      timeout: Seconds after which the search returns the pages read so far. None waits for all.
    """

    def __init__(
        self,
        finder: Finder,
        reader: PageReader | None = None,
        summariser: PageSummariser | None = None,
        *,
        max_results: int = 5,
        num_spare: int = 5,
        max_chars: int = 1500,
        timeout: float | None = None,
    ):
        self._timeout = timeout
        self._finder, self._reader, self._summariser = finder, reader, summariser
        self._max_results, self._num_spare, self._max_chars = max_results, num_spare, max_chars

    async def __call__(self, query: Query) -> Observation:
        if query.text is None:
            return Observation(status="failed", error="the query has no text")
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            hits = await self._finder.search(query.text, self._max_results + self._num_spare)
        except WebError as error:
            return Observation(status="failed", error=f"search: {error}")
        if not hits:
            return Observation(status="empty")

        async def read(hit: Hit) -> Result:
            return await self._result(hit, query.question)

        results, errors = await first_successful(hits, self._max_results, read, deadline=deadline)
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
                raise BodyError("the hit has no snippet")
        else:
            page = await self._reader.read(hit.link)
            if reason := missing_content(page):
                raise BodyError(reason)
            if self._summariser is None:
                text = await _select_passages(page, question, self._max_chars)
            else:
                text = await self._summariser.summarise(page, question)
        return text_result(hit.link or hit.title, text)


async def _select_passages(page: str, question: str, max_chars: int) -> str:
    """Return `best_passages`, computed in a worker if that takes longer than sending it the page.

    Raises:
      BodyError: The worker exceeded a limit.
    """
    if len(page) < _MIN_WORKER_CHARS:
        return best_passages(page, question, max_chars)
    try:
        return await workers.run_async(best_passages, page, question, max_chars)
    except workers.WorkerError as error:
        raise BodyError(f"selecting the passages {error}") from None


class PassageSearch:
    """Text search tool on an index of passages, which need no page reader.

    Args:
      retrieval: Client that finds (title, text) of passages.
      cached_calls: Cache of search results.
      name: Name of the index, part of the cache key because indexes contain different passages.
      max_results: Maximum number of passages in an observation.
    """

    def __init__(
        self, retrieval: Retrieval, cached_calls: CachedCalls, name: str, *, max_results: int = 5
    ):
        self._retrieval, self._cached_calls = retrieval, cached_calls
        self._name, self._max_results = name, max_results

    async def __call__(self, query: Query) -> Observation:
        if query.text is None:
            return Observation(status="failed", error="the query has no text")
        text, count = query.text, self._max_results
        key = json.dumps([self._name, text, count])
        try:
            passages = await self._cached_calls.get(
                "passages", key, lambda: self._retrieval.passages(text, count)
            )
        except WebError as error:
            return Observation(status="failed", error=f"search: {error}")
        results = [text_result(title, text) for title, text in passages[:count]]
        return Observation(status="ok" if results else "empty", results=results)
