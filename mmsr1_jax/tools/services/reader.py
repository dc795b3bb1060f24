"""Reading a page without a service: fetched with care, and its text taken out by trafilatura."""

import asyncio

import trafilatura

from mmsr1_jax.tools.service import Service
from mmsr1_jax.tools.web import PAGES


class Reader:
    """`max_bytes`: of a page, decompressed."""

    def __init__(self, service: Service, *, max_bytes: int = 5_000_000):
        self._service, self._max_bytes = service, max_bytes

    async def read(self, url: str) -> str:
        """Text; empty where nothing of a page's text can be made out. Raises WebError."""
        answer = await self._service.call("GET", url, accept=PAGES, max_bytes=self._max_bytes)
        if answer.media_type in ("text/plain", "text/markdown"):
            return answer.body.decode(_codec(answer.charset), "replace")
        # Takes a while on a large page, and is not to hold up the other calls.
        return await asyncio.to_thread(extract, answer.body)


def extract(html: bytes) -> str:
    """The main text of a page, without menus, comments and scripts."""
    try:
        return trafilatura.extract(html, include_comments=False, include_tables=True) or ""
    except Exception:  # its parsers may raise anything on hostile input
        return ""


def _codec(charset: str | None) -> str:
    """The name of a codec for text; what is unknown, or no codec for text, is taken for UTF-8."""
    try:
        b"".decode(charset or "utf-8")
    except LookupError:
        return "utf-8"
    return charset or "utf-8"
