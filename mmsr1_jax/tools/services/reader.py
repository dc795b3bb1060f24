"""Reading a page without a service: fetched with care, its text extracted in a worker process."""

from mmsr1_jax.tools.page_checks import nothing_said
from mmsr1_jax.tools.page_text import PLAIN, PageError, extract, read_page
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import PAGES, BodyError
from mmsr1_jax.utils import workers

__all__ = ["LIMITS", "Reader", "extract"]

# A page of 1 MB takes about a second.
LIMITS = workers.Limits(cpu_seconds=4.0, wall_seconds=60.0, memory_bytes=1 << 30)


class Reader:
    """`max_bytes`: of a page, decompressed; `max_html`: of what its text is taken out of."""

    def __init__(self, service: Service, *, max_bytes: int = 5_000_000, max_html: int = 1_000_000):
        self._service, self._max_bytes, self._max_html = service, max_bytes, max_html

    async def read(self, url: str) -> str:
        """Return a page's text. Raises WebError, also for a page that says nothing."""
        answer = await self._service.call("GET", url, accept=PAGES, max_bytes=self._max_bytes)
        body = answer.body if answer.media_type in PLAIN else answer.body[: self._max_html]
        try:
            text = await workers.run_async(
                read_page, body, answer.charset, answer.media_type, limits=LIMITS
            )
        except PageError as error:
            raise BodyError(str(error)) from None
        except workers.WorkerError as error:
            raise BodyError(f"reading the page {error}") from None
        if why := nothing_said(text):
            raise BodyError(why)
        return text
