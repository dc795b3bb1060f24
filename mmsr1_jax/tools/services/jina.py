"""Client of Jina Reader, which returns pages as Markdown. It also works without a key, slower."""

import re
from typing import Any

from mmsr1_jax.tools.charsets import decode
from mmsr1_jax.tools.page_checks import nothing_said
from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.services import key_of, raise_failure, text_of
from mmsr1_jax.tools.web import JSON, Answer, BodyError
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
    def __init__(self, service: Service, *, base_url: str = BASE_URL):
        self._service, self._base = service, base_url
        key = key_of(KEY, needed=False)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def read(self, url: str) -> str:
        """Return a page as Markdown, below the header (title, URL) that Jina adds.

        Raises:
          WebError: The request failed, or the page is missing, an error page or without content.
        """
        answer = await self._service.call(
            "GET", f"{self._base}/{url}", headers=self._headers, accept=("text/", *JSON),
            max_bytes=_MAX_BYTES,
        )  # fmt: skip
        try:
            return await workers.run_async(_page, answer)
        except workers.WorkerError as error:
            raise BodyError(f"reading the answer {error}") from None


def _page(answer: Answer) -> str:
    """Return the Markdown of an answer; runs in a worker. Raises WebError, see `Jina.read`."""
    text = _markdown(answer)
    _check(text)
    return text


def _markdown(answer: Answer) -> str:
    text = decode(answer.body, answer.charset, markup=False)
    if not (answer.media_type in JSON or text.lstrip()[:1] == "{"):
        return text
    try:
        data: Any = answer.json()
    except BodyError:
        if answer.media_type in JSON:
            raise
        return text
    if not isinstance(data, dict) or "data" not in data:
        if answer.media_type in JSON:
            raise BodyError("not an answer of Jina")
        return text  # a page that is JSON itself
    raise_failure(data)
    page = data["data"] if isinstance(data["data"], dict) else {}
    content = text_of(page, "content") or text_of(page, "text")
    title = text_of(page, "title")
    return f"Title: {title}\n\n{_CONTENT}\n{content}" if title else content


def _check(text: str) -> None:
    """Raise BodyError if no page with content follows the header, or the page is an error."""
    title, place = "", 0
    while place < len(text):
        end = text.find("\n", place)
        end = len(text) if end < 0 else end
        line = text[place:end]
        if line.startswith(_CONTENT):
            place += len(_CONTENT)
            break
        field = _FIELD.match(line)
        if field is None and line.strip():
            break
        place = end + 1
        if field and field[1] == "Title":
            title = field[2]
        if field and field[1] == "Warning":
            if failed := _FAILED.search(line):
                raise BodyError(f"HTTP status {failed[1]} of the page itself")
            if "CAPTCHA" in line:
                raise BodyError("a check for humans")
    page = text[place:]
    if why := nothing_said(page) or nothing_said(f"{title}\n{page}"):
        raise BodyError(why)
