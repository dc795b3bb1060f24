"""Page reader without an external service; the text is extracted in a worker process."""

from mmsr1_jax.tools.page_checks import missing_content
from mmsr1_jax.tools.page_text import PLAIN, PageError, extract, read_page
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import PAGE_TYPES, BodyError
from mmsr1_jax.utils import workers

__all__ = ["LIMITS", "Reader", "extract"]

# A page of 1 MB takes about a second.
LIMITS = workers.Limits(cpu_seconds=4.0, wall_seconds=60.0, memory_bytes=1 << 30)


class Reader:
    """Page reader that fetches pages itself.

    Args:
      service: HTTP client for the requests.
      max_bytes: Maximum size of a page in bytes, decompressed.
      max_html_bytes: Number of bytes of an HTML page from which text is extracted; the rest is
        ignored.
    """

    def __init__(
        self, service: Service, *, max_bytes: int = 5_000_000, max_html_bytes: int = 1_000_000
    ):
        self._service, self._max_bytes, self._max_html_bytes = service, max_bytes, max_html_bytes

    async def read(self, url: str) -> str:
        """Return the text of a page. Raises WebError, also if the page has no content."""
        response = await self._service.call(
            "GET", url, accept=PAGE_TYPES, max_bytes=self._max_bytes
        )
        body = (
            response.body if response.media_type in PLAIN else response.body[: self._max_html_bytes]
        )
        try:
            text = await workers.run_async(
                read_page, body, response.charset, response.media_type, limits=LIMITS
            )
        except PageError as error:
            raise BodyError(str(error)) from None
        except workers.WorkerError as error:
            raise BodyError(f"reading the page {error}") from None
        if reason := missing_content(text):
            raise BodyError(reason)
        return text
