"""Reading a page without a service: fetched with care, and its text taken out by trafilatura."""

import asyncio
import concurrent.futures

from mmsr1_jax.tools.page_checks import nothing_said
from mmsr1_jax.tools.page_text import PLAIN, PageError, extract, read_page
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import PAGES, BodyError

__all__ = ["Reader", "extract"]

# Extraction takes seconds on odd pages: it is not to hold up the look-ups of names, the store and
# the pictures, which share the loop's own threads.
_THREADS = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="extract")
_SECONDS = 10.0  # after which a page's text is not waited for


class Reader:
    """`max_bytes`: of a page, decompressed; `max_html`: of what its text is taken out of."""

    def __init__(self, service: Service, *, max_bytes: int = 5_000_000, max_html: int = 1_000_000):
        self._service, self._max_bytes, self._max_html = service, max_bytes, max_html

    async def read(self, url: str) -> str:
        """Return a page's text. Raises WebError, also for a page that says nothing."""
        answer = await self._service.call("GET", url, accept=PAGES, max_bytes=self._max_bytes)
        body = answer.body if answer.media_type in PLAIN else answer.body[: self._max_html]
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(_THREADS, read_page, body, answer.charset, answer.media_type)
        try:
            text = await asyncio.wait_for(work, _SECONDS)
        except TimeoutError:
            raise BodyError("its text takes too long to be taken out") from None
        except PageError as error:
            raise BodyError(str(error)) from None
        if why := nothing_said(text):
            raise BodyError(why)
        return text
