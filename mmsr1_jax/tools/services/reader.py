"""Reading a page without a service: fetched with care, and its text taken out by trafilatura."""

import asyncio
import concurrent.futures
import re

import trafilatura

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import PAGES, BodyError

# Codecs of text that pages are written in; what else they may name is not for pages.
_CHARSET = re.compile(
    r"utf-?(8|16|32)(-?[bl]e)?|us-ascii|ascii|latin-?1|iso-?8859-?\d+|(windows|cp)-?125\d|koi8-[ru]|"
    r"gb2312|gbk|gb18030|big5|shift[-_]jis|euc-(jp|kr)|iso-2022-jp|mac-?roman"
)
# Extraction takes seconds on odd pages: it is not to hold up the look-ups of names, the store and
# the pictures, which share the loop's own threads.
_THREADS = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="extract")
_SECONDS = 10.0  # after which a page's text is not waited for


class Reader:
    """`max_bytes`: of a page, decompressed; `max_html`: of what its text is taken out of."""

    def __init__(self, service: Service, *, max_bytes: int = 5_000_000, max_html: int = 1_000_000):
        self._service, self._max_bytes, self._max_html = service, max_bytes, max_html

    async def read(self, url: str) -> str:
        """Text; empty where nothing of a page's text can be made out. Raises WebError."""
        answer = await self._service.call("GET", url, accept=PAGES, max_bytes=self._max_bytes)
        if answer.media_type in ("text/plain", "text/markdown"):
            return answer.body.decode(_codec(answer.charset), "replace")
        loop = asyncio.get_running_loop()
        text = loop.run_in_executor(_THREADS, extract, answer.body[: self._max_html])
        try:
            return await asyncio.wait_for(text, _SECONDS)
        except TimeoutError:
            raise BodyError("its text takes too long to be taken out") from None


def extract(html: bytes) -> str:
    """The main text of a page, without menus, comments and scripts."""
    try:
        return trafilatura.extract(html, include_comments=False, include_tables=True) or ""
    except Exception:  # its parsers may raise anything on hostile input
        return ""


def _codec(charset: str | None) -> str:
    """The codec of a page's text; UTF-8 for what is none."""
    name = (charset or "utf-8").lower()
    return name if _CHARSET.fullmatch(name) else "utf-8"
