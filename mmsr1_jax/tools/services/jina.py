"""Client of Jina Reader, which returns pages as Markdown. It also works without a key, slower."""

import re
from typing import Any

from mmsr1_jax.tools.charsets import decode
from mmsr1_jax.tools.page_checks import missing_content
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import api_key, raise_reported_error, text_field
from mmsr1_jax.tools.web import JSON_TYPES, BodyError, WebResponse
from mmsr1_jax.utils import workers

BASE_URL = "https://r.jina.ai"
KEY = "JINA_API_KEY"
# Header lines above the page.
_FIELD = re.compile(
    r"(Title|URL Source|Published Time|Number of Pages|Warning|Description|Image|Language):(.*)"
)
_CONTENT = "Markdown Content:"
_MAX_BYTES = 5_000_000
_FAILED = re.compile(r"Target URL returned error (\d{3})\b")


class Jina:
    """Client of Jina Reader."""

    def __init__(self, service: Service, *, base_url: str = BASE_URL):
        self._service, self._base = service, base_url
        key = api_key(KEY, required=False)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def read(self, url: str) -> str:
        """Return a page as Markdown, below the header (title, URL) that Jina adds.

        Raises:
          WebError: The request failed, or the page is missing, an error page or without content.
        """
        response = await self._service.call(
            "GET", f"{self._base}/{url}", headers=self._headers, accept=("text/", *JSON_TYPES),
            max_bytes=_MAX_BYTES,
        )  # fmt: skip
        try:
            return await workers.run_async(_page, response)
        except workers.WorkerError as error:
            raise BodyError(f"reading the response {error}") from None


def _page(response: WebResponse) -> str:
    """Return the Markdown in a response; runs in a worker. Raises WebError, see `Jina.read`."""
    text = _markdown(response)
    _check_content(text)
    return text


def _markdown(response: WebResponse) -> str:
    text = decode(response.body, response.charset, markup=False)
    if not (response.media_type in JSON_TYPES or text.lstrip()[:1] == "{"):
        return text
    try:
        data: Any = response.json()
    except BodyError:
        if response.media_type in JSON_TYPES:
            raise
        return text
    if not isinstance(data, dict) or "data" not in data:
        if response.media_type in JSON_TYPES:
            raise BodyError("not a response of Jina Reader")
        return text  # a page that is JSON itself
    raise_reported_error(data)
    page = data["data"] if isinstance(data["data"], dict) else {}
    content = text_field(page, "content") or text_field(page, "text")
    title = text_field(page, "title")
    return f"Title: {title}\n\n{_CONTENT}\n{content}" if title else content


def _check_content(text: str) -> None:
    """Raise BodyError if no page with content follows the header, or the page is an error."""
    title, position = "", 0
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        line = text[position:end]
        if line.startswith(_CONTENT):
            position += len(_CONTENT)
            break
        field = _FIELD.match(line)
        if field is None and line.strip():
            break
        position = end + 1
        if field and field[1] == "Title":
            title = field[2]
        if field and field[1] == "Warning":
            if match := _FAILED.search(line):
                raise BodyError(f"the page has HTTP status {match[1]}")
            if "CAPTCHA" in line:
                raise BodyError("the page is a bot check")
    page = text[position:]
    if reason := missing_content(page) or missing_content(f"{title}\n{page}"):
        raise BodyError(reason)
